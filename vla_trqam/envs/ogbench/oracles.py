"""Play for OGBench's data: its own oracles for the arm's tasks, the shortest path in a maze.

As OGBench makes its data: no episode ends at a goal; a goal that is reached or given up makes room
for the next. "play" follows plans with smooth noise, "noisy" is closed-loop with Gaussian noise and
random actions. In a maze "navigate" walks from goal to goal, "stitch" to one four cells away and
"path" to any, to stay there; "explore" takes a new direction every ten steps. The oracles are in
OGBench's package, the scripts that drive them only in its repository, so this is their driver. Ant
and humanoid want an expert policy, and are not played.
"""

from __future__ import annotations

import importlib
import re
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from vla_trqam.envs.ogbench.family import keep_action_space, require_ogbench
from vla_trqam.envs.processes import in_processes
from vla_trqam.envs.seeding import global_seed
from vla_trqam.errors import UserError

NAME = re.compile(
    r"(?:(cube|scene|puzzle)(?:-\w+)?-(play|noisy)|pointmaze-\w+-(navigate|stitch|path|explore))-v0"
)
PLAN_NOISE = {"noise": 0.1, "noise_smoothing": 0.5}
MARKOV_NOISE, MARKOV_SCALES = 0.1, np.array([1.0, 1.0, 1.0, 3.0, 10.0])
RANDOM_ACTIONS = {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}
NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))
MAZE_NOISE, STITCH_CELLS, EXPLORE_STEPS = 0.5, 4, 10
STACKED = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35)} | {
    "quadruple": (0.1, 0.5)
}
"""How likely a cube is to be put on another one; drawn for each episode from these limits."""
ARRAYS = {"qpos": "prev_qpos", "qvel": "prev_qvel", "button_states": "prev_button_states"}
"""What of a step's `info` the data has, of the state that the step starts from."""


@dataclass(frozen=True)
class PlayPlan:
    """An episode, of which it is a function.

    Attributes:
        dataset: OGBench's name, like ``cube-single-play-v0``.
        seed: of the whole dataset.
        number: of the episode.
        num_steps: T; the episode has a row more.
    """

    dataset: str
    seed: int
    number: int
    num_steps: int


@dataclass(frozen=True)
class PlayedEpisode:
    """What came of a plan.

    Attributes:
        arrays: OGBench's, (T + 1, ...) each.
        goals: that were reached or given up.
        reached: of these.
    """

    arrays: dict[str, np.ndarray]
    goals: int
    reached: int


class Player(ABC):
    """Acts for goals of its own choice."""

    def __init__(self, env: gymnasium.Env[Any, np.ndarray]) -> None:
        """Play in `env`, which has no limit of its own."""
        self.env = env
        self.goals = self.reached = 0

    @abstractmethod
    def begin(self, seed: int | None) -> np.ndarray:
        """Starts an episode; returns its first observation."""

    @abstractmethod
    def action(self) -> np.ndarray:
        """(A,) for the present state, not yet clipped."""

    @abstractmethod
    def saw(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """What the action led to: where the goal is settled, the next one is chosen."""

    def keeps(self, arrays: dict[str, np.ndarray]) -> bool:
        """Whether the episode may go into the data."""
        return True


class PointPlayer(Player):
    """Walks in a maze, with noise."""

    def __init__(self, env: gymnasium.Env[Any, np.ndarray], kind: str) -> None:
        """Play "navigate", "stitch", "path" or "explore" data."""
        super().__init__(env)
        inner: Any = env.unwrapped
        self._inner, self._kind, self._steps = inner, kind, 0
        self._free = [(int(i), int(j)) for i, j in np.argwhere(inner.maze_map == 0)]

    def begin(self, seed: int | None) -> np.ndarray:
        """At a random free cell."""
        start = _one_of(self._free)
        info = {"init_ij": start, "goal_ij": self._goal_from(start)}
        observation, _ = self.env.reset(seed=seed, options={"task_info": info})
        self._steps, self.goals = 0, int(self._kind in ("stitch", "path"))
        return np.asarray(observation)

    def action(self) -> np.ndarray:
        """At full speed."""
        heading = self._explored() if self._kind == "explore" else self._to_the_goal()
        return np.asarray(heading + np.random.normal(0.0, MAZE_NOISE, heading.shape))

    def saw(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """Where many goals are played for, one that is reached makes room for the next."""
        if info["success"] and self._kind == "navigate":
            self.goals, self.reached = self.goals + 1, self.reached + 1
            self._inner.set_goal(goal_ij=self._goal_from(()))
        elif info["success"]:
            self.reached = self.goals

    def _explored(self) -> np.ndarray:
        """The direction of the moment, of length 1."""
        if self._steps % EXPLORE_STEPS == 0:
            direction = np.random.normal(size=2)
            self._direction = direction / (np.linalg.norm(direction) + 1e-6)
        self._steps += 1
        return self._direction

    def _to_the_goal(self) -> np.ndarray:
        """The direction of the next cell of the shortest path, of length 1."""
        inner = self._inner
        here, goal = inner.get_xy(), np.asarray(inner.cur_goal_xy)
        target = goal
        if inner.xy_to_ij(here) != inner.xy_to_ij(goal):
            target, _ = inner.get_oracle_subgoal(here, goal)
        return np.asarray((target - here) / (np.linalg.norm(target - here) + 1e-6))

    def _goal_from(self, start: tuple[int, ...]) -> tuple[int, ...]:
        """A cell where ways part, turn or end; of "stitch" data one four cells from the start."""
        free = set(self._free)
        if self._kind == "stitch":
            return _one_of(_cells_away(start, free, STITCH_CELLS) or [start])
        return _one_of([cell for cell in self._free if not _within_a_hallway(cell, free)])


def _within_a_hallway(cell: tuple[int, ...], free: Container[tuple[int, ...]]) -> bool:
    i, j = cell
    down, across = (
        [(i - 1, j) in free, (i + 1, j) in free],
        [(i, j - 1) in free, (i, j + 1) in free],
    )
    return (all(down) and not any(across)) or (all(across) and not any(down))


def _cells_away(
    start: tuple[int, ...], free: Container[tuple[int, ...]], steps: int
) -> list[tuple[int, ...]]:
    """The free cells that are so many steps from the start, by the shortest path."""
    seen, edge = {start}, [start]
    for _ in range(steps):
        around = [(i + di, j + dj) for i, j in edge for di, dj in NEIGHBOURS]
        edge = [cell for cell in dict.fromkeys(around) if cell in free and cell not in seen]
        seen.update(edge)
    return edge


def _one_of(cells: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return cells[np.random.randint(len(cells))]


class ArmPlayer(Player):
    """OGBench's oracle for whatever target the environment names."""

    def __init__(self, env: gymnasium.Env[Any, np.ndarray], domain: str, kind: str) -> None:
        """Play the cubes, the scene or the puzzle ("cube", ...) as "play" or "noisy" data."""
        super().__init__(env)
        self._domain, self._noisy = domain, kind == "noisy"
        self._oracles = _oracles(env, domain, self._noisy)

    def begin(self, seed: int | None) -> np.ndarray:
        """Draws how much noise the episode has, and how often cubes are stacked."""
        self._observation, self._info = self.env.reset(seed=seed)
        limits = STACKED.get(getattr(self.env.unwrapped, "_env_type", ""), (0.5, 0.5))
        stacked = limits if self._domain == "cube" else (0.5, 0.5)
        self._p_stack = np.random.uniform(*stacked)
        self._noise = np.random.uniform(0.0, MARKOV_NOISE)
        self._take_oracle()
        return np.asarray(self._observation)

    def action(self) -> np.ndarray:
        """The oracle's; of noisy data with noise, or a random one."""
        if self._noisy and np.random.random() < RANDOM_ACTIONS[self._domain]:
            return np.random.uniform(-1.0, 1.0, 5)
        action = np.asarray(self._oracle.select_action(self._observation, self._info))
        if not self._noisy:
            return action
        return action + np.random.normal(0.0, self._noise * MARKOV_SCALES)

    def saw(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """A target that the oracle is done with makes room for the next."""
        self._observation, self._info = observation, info
        if self._oracle.done:
            self.goals, self.reached = self.goals + 1, self.reached + bool(info["success"])
            inner: Any = self.env.unwrapped
            self._observation, self._info = inner.set_new_target(p_stack=self._p_stack)
            self._take_oracle()

    def keeps(self, arrays: dict[str, np.ndarray]) -> bool:
        """Of the scene none whose cube leaves what a camera sees, unless into the drawer."""
        if self._domain != "scene":
            return True
        y, z = arrays["qpos"][:, 15], arrays["qpos"][:, 16]
        left = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
        return not bool((y >= 0.29).any() or left.any())

    def _take_oracle(self) -> None:
        self._oracle = self._oracles[self._info["privileged/target_task"]]
        self._oracle.reset(self._observation, self._info)


def make_player(dataset: str) -> Player:
    """Who plays for a dataset of OGBench's.

    Raises:
        UserError: OGBench is not installed, has no such environment, or nobody can.
    """
    match = NAME.fullmatch(dataset)
    if match is None:
        raise UserError(
            f"--dataset={dataset} cannot be made here; cube-single-play-v0, scene-noisy-v0, "
            "puzzle-3x3-play-v0 and pointmaze-medium-navigate-v0 are the kind that can (ant and "
            "humanoid want an expert policy: their data is OGBench's own files)"
        )
    require_ogbench(f"--dataset={dataset}")
    arm, kind, walk = match.groups()
    name = "-".join([*dataset.split("-")[:-2], "v0"])
    settings = {"mode": "data_collection"} if arm else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32 limits of float64 boxes
        import ogbench  # noqa: F401 (registers the environments)

        try:
            env = gymnasium.make(
                name,
                terminate_at_goal=False,
                max_episode_steps=10**9,  # the plan says how long
                disable_env_checker=True,
                **settings,
            )
        except gymnasium.error.Error as error:
            raise UserError(f"--dataset={dataset} is none of OGBench's: {error}") from None
        keep_action_space(env.unwrapped)
    return ArmPlayer(env, arm, kind) if arm else PointPlayer(env, walk)


def play(player: Player, plan: PlayPlan) -> PlayedEpisode:
    """Plays the episode of a plan, again where the player does not keep it."""
    seed = int(np.random.SeedSequence((plan.seed, plan.number)).generate_state(1)[0])
    with global_seed(seed):
        player.env.action_space.seed(seed)
        once: int | None = seed
        while True:
            player.goals = player.reached = 0
            arrays = _rows(player, once, plan.num_steps + 1)
            if player.keeps(arrays):
                return PlayedEpisode(arrays, player.goals, player.reached)
            once = None


def play_all(plans: Sequence[PlayPlan], workers: int) -> Iterator[PlayedEpisode]:
    """Plays the plans, which are all of one dataset, and yields the episodes in order.

    Args:
        plans: the episodes.
        workers: processes; 0 plays in this one.
    """
    if not plans:
        return
    dataset = plans[0].dataset
    if workers == 0:
        player = make_player(dataset)
        yield from (play(player, plan) for plan in plans)
        player.env.close()
    else:
        yield from in_processes(_play, plans, workers, _start_worker, dataset)


def _rows(player: Player, seed: int | None, count: int) -> dict[str, np.ndarray]:
    rows: dict[str, list[Any]] = defaultdict(list)
    observation = player.begin(seed)
    for _ in range(count):
        action = np.clip(player.action(), -1.0, 1.0)
        rows["observations"].append(observation)
        rows["actions"].append(action)
        observation, _, _, _, info = player.env.step(action)
        for name, key in ARRAYS.items():
            if key in info:
                rows[name].append(info[key])
        player.saw(observation, info)
    arrays = {
        name: np.asarray(values, np.int64 if name == "button_states" else np.float32)
        for name, values in rows.items()
    }
    return arrays | {"terminals": np.arange(count) == count - 1}


def _oracles(env: Any, domain: str, noisy: bool) -> dict[str, Any]:
    """OGBench's, by the kind of target: cube, button, drawer, window."""
    kind, style, knobs = ("markov", "Markov", {}) if noisy else ("plan", "Plan", PLAN_NOISE)
    oracles = {}
    for target in ("cube", "button", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{kind}.{target}_{kind}")
        make = getattr(module, f"{target.title()}{style}Oracle")
        shut = {"gripper_always_closed": True} if (domain, target) == ("puzzle", "button") else {}
        oracles[target] = make(env=env, **knobs, **shut)
    return oracles


_player: Player | None = None


def _start_worker(dataset: str) -> None:
    global _player
    _player = make_player(dataset)


def _play(plan: PlayPlan) -> PlayedEpisode:
    assert _player is not None
    return play(_player, plan)

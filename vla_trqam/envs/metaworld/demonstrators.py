"""Meta-World's own scripted policies, well and badly played, in LeRobot's environments.

A scripted policy knows where everything is. A demonstrator believes the object some centimetres
from there, the whole episode long, and its hand shakes: it fails as people do, by missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.lerobot.columns import OBJECT_POSITIONS
from vla_trqam.envs.lerobot.family import LeRobotTaskEnv, lerobot_family
from vla_trqam.envs.lerobot.sight import SightByFormat
from vla_trqam.envs.processes import in_processes
from vla_trqam.errors import UserError

OBJECT = slice(4, 7)
POSES = (*range(4, 7), *range(11, 14), *range(36, 39))
"""Of Meta-World's numbers: positions (m) of the object, of a second one, and of the goal."""
FIRST_SEED = 4_000_000
SEEDS_OF_A_DATASET = 100_000
NOISE_CORRELATION = 0.7


@dataclass(frozen=True)
class Habits:
    """How well the controls are held.

    Attributes:
        noise: standard deviation of the action's noise (action units).
        offset: standard deviation (m) of where the object is believed, of each axis.
    """

    noise: float
    offset: float


QUALITIES: Mapping[str, Habits] = MappingProxyType(
    {"better": Habits(0.05, 0.0), "okay": Habits(0.3, 0.02), "worse": Habits(0.5, 0.05)}
)


@dataclass(frozen=True)
class EpisodePlan:
    """All that determines an episode of a suite: same plan, same episode, in any process.

    Attributes:
        seed: of the dataset.
        number: of the episode; number modulo the number of tasks is the task.
        quality: of the demonstrator.
        every: steps from frame to frame.
    """

    seed: int
    number: int
    quality: str
    every: int


def check_plans(episodes: int, qualities: Sequence[str]) -> None:
    """Refuses what no dataset can be made of.

    Raises:
        UserError: a quality that there is not, or more episodes than there are seeds for.
    """
    for quality in qualities:
        if quality not in QUALITIES:
            raise UserError(
                f"--qualities: {quality!r} is not known; there are {', '.join(QUALITIES)}"
            )
    if episodes > SEEDS_OF_A_DATASET:
        raise UserError(
            f"--episodes={episodes} is more than the {SEEDS_OF_A_DATASET} that a seed has; make "
            "several datasets"
        )


def episode_plans(
    seed: int, episodes: int, tasks: int, qualities: Sequence[str], every: int
) -> list[EpisodePlan]:
    """The plans of a dataset: the tasks in turn, and each task's demonstrators in turn."""
    return [
        EpisodePlan(seed, number, qualities[number // tasks % len(qualities)], every)
        for number in range(episodes)
    ]


def play_all(
    tasks: Sequence[str], plans: Sequence[EpisodePlan], *, max_steps: int, workers: int
) -> Iterator[Episode]:
    """Plays the plans and yields what comes of them, in their order.

    Args:
        tasks: the suite, by Meta-World's names.
        plans: of its episodes.
        max_steps: control steps after which an episode is cut.
        workers: processes; 0 plays in this one.

    Raises:
        UserError: a task that there is not, or Meta-World is not installed.
    """
    suite = f"{max_steps}:{','.join(tasks)}"
    if workers == 0:
        env = _make_env(suite)
        try:
            yield from (play(env, plan) for plan in plans)
        finally:
            env.close()
    else:
        yield from in_processes(_play_in_worker, plans, workers, _start_worker, suite)


def play(env: LeRobotTaskEnv, plan: EpisodePlan) -> Episode:
    """One episode, to its success or to the limit.

    Frames are of every n-th step, and of where the limit cut it; the column
    :data:`OBJECT_POSITIONS` has what :data:`POSES` names, before each action.
    """
    rng = np.random.default_rng([plan.seed, plan.number])
    habits = QUALITIES[plan.quality]
    state, _ = env.reset(seed=FIRST_SEED + SEEDS_OF_A_DATASET * plan.seed + plan.number)
    hand = _Hand(env, habits, rng)
    states, frames, poses = [state], [env.look()], []
    actions: list[np.ndarray] = []
    success = ended = False
    while not ended:
        poses.append(hand.sight.numbers[list(POSES)])
        actions.append(hand.act())
        state, _, success, cut, _ = env.step(actions[-1])
        ended = success or cut
        states.append(state)
        if cut or (len(actions) % plan.every == 0 and not ended):
            frames.append(env.look())
    observed = np.arange(len(states)) % plan.every == 0
    observed[-1] = not success
    rewards = np.zeros(len(actions), np.float32)
    rewards[-1] = success
    return Episode(
        observations=np.stack(states),
        actions=np.stack(actions),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
        task=env.task_text,
        images={name: np.stack([seen[name] for seen in frames]) for name in frames[0]},
        observed=observed,
        columns={OBJECT_POSITIONS: np.stack(poses).astype(np.float32)},
    )


class _Hand:
    """A scripted policy with the habits of a demonstrator, in one episode."""

    def __init__(self, env: LeRobotTaskEnv, habits: Habits, rng: np.random.Generator) -> None:
        assert isinstance(env.sight, SightByFormat)
        self.sight = env.sight
        self._script: Any = env.env.unwrapped.expert_policy  # type: ignore[attr-defined]
        self._habits, self._rng = habits, rng
        self._offset = habits.offset * rng.standard_normal(3)
        self._noise = np.zeros(4)

    def act(self) -> np.ndarray:
        """(4,) float32, as it is executed."""
        believed = self.sight.numbers.copy()
        believed[OBJECT] += self._offset
        fresh = self._habits.noise * self._rng.standard_normal(4)
        kept = NOISE_CORRELATION
        self._noise = kept * self._noise + np.sqrt(1.0 - kept**2) * fresh
        wanted = np.asarray(self._script.get_action(believed)) + self._noise
        return np.clip(wanted, -1.0, 1.0).astype(np.float32)


def _make_env(suite: str) -> LeRobotTaskEnv:
    limit, _, tasks = suite.partition(":")
    env = lerobot_family("metaworld", task=tasks, max_episode_steps=int(limit)).make(False)
    assert isinstance(env, LeRobotTaskEnv)
    return env


_worker: LeRobotTaskEnv | None = None


def _start_worker(suite: str) -> None:
    global _worker
    _worker = _make_env(suite)


def _play_in_worker(plan: EpisodePlan) -> Episode:
    assert _worker is not None
    return play(_worker, plan)

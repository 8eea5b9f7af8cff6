"""OGBench's single-task environments as a family: states alone, success from `info`.

Rewards. OGBench 1.2 judges a single task's success by the state *before* the action: reward and
termination of a step are those of the state that it starts from, in its environments and, by
relabelling, in its data. An episode here keeps that timing: its last step starts from a solved
state and has reward 1, all before have 0. `success_minus_one` (the settings' `--dataset.reward`, of
LeRobot's recipes `--dataset.kind`) makes of it -1 until then and 0 on that step. For the mazes and
`cube-single` these are OGBench's own rewards, to the number; for the tasks of several parts, where
OGBench's count the parts that are missing (-2...0 for `cube-double`), they are what the papers call
the sparse form: -1 where OGBench's is not 0. `sparse` leaves 1 and 0. A family that is asked for
`dense` rewards gives OGBench's own instead. Success that the last step allowed leads to does not
count, as in OGBench.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from vla_trqam.envs.base import EnvFamily, SeededTaskEnv
from vla_trqam.errors import UserError

INSTALL = "uv sync --extra ogbench"
DOMAINS = (
    *("antmaze-large-navigate", "antmaze-giant-navigate"),
    *("humanoidmaze-medium-navigate", "humanoidmaze-large-navigate"),
    *("scene-play", "puzzle-3x3-play", "puzzle-4x4-play"),
    *("cube-double-play", "cube-triple-play", "cube-quadruple-play"),
)
"""The ten of the papers, each with tasks 1 to 5; others of OGBench's with states do as well."""
TASK_TEXTS = {
    "pointmaze": "move the point to the goal",
    "antmaze": "walk the ant to the goal",
    "humanoidmaze": "walk the humanoid to the goal",
    "antsoccer": "dribble the ball to the goal",
    "cube": "put every cube at its goal",
    "scene": "bring cube, buttons, drawer and window into the goal's state",
    "puzzle": "press the buttons until all have the goal's colours",
}
FRAME_SIZE = 256
NAME = re.compile(r"([a-z]+)((?:-[a-z0-9]+)*)-[a-z]+-singletask(-task[1-5])?-v0")


def task_names() -> list[str]:
    """The names of the 50 tasks."""
    return [f"{domain}-singletask-task{k}-v0" for domain in DOMAINS for k in range(1, 6)]


def ogbench_family(
    task: str | None, *, max_episode_steps: int | None = None, dense: bool = False
) -> EnvFamily:
    """One of OGBench's single tasks.

    It is made once to ask for its sizes: half a second for a maze, two for the arm's tasks.

    Args:
        task: a name as OGBench has it, like ``cube-double-play-singletask-task2-v0``; without
            ``-taskN`` it is the domain's default one.
        max_episode_steps: control steps after which an episode is truncated; None for OGBench's.
        dense: rewards are OGBench's own, minus the number of parts that are missing.

    Raises:
        UserError: OGBench is not installed or has no such task, or a number below 1.
    """
    match = NAME.fullmatch(task or "")
    if task is None or match is None or match[1] not in TASK_TEXTS:
        raise UserError(
            f"--env.task={task} is none of OGBench's single tasks with states; they have names "
            f"like {task_names()[-1]} or pointmaze-medium-navigate-singletask-task1-v0"
        )
    require_ogbench(f"--env.task={task}")
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    if max_episode_steps is not None and max_episode_steps < 1:
        raise UserError(f"max_episode_steps is {max_episode_steps}; it must be at least 1.")
    env = make_ogbench(task, **limit)
    state, _ = env.reset(seed=0)
    assert env.spec is not None
    assert env.spec.max_episode_steps is not None
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    steps, space, rate = env.spec.max_episode_steps, env.action_space, _control_rate(env)
    env.close()
    return EnvFamily(
        name="ogbench",
        task=task,
        make=partial(_make, task, TASK_TEXTS[match[1]], steps, dense),
        max_episode_steps=steps,
        control_rate=rate,
        task_texts=(TASK_TEXTS[match[1]],),
        action_low=tuple(map(float, space.low)),
        action_high=tuple(map(float, space.high)),
        state_size=len(state),
    )


def require_ogbench(flag: str) -> None:
    """Refuses what needs OGBench where it is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("ogbench") is None:
        raise UserError(f"{flag} needs the package ogbench, which is not here: {INSTALL}")


class OGBenchEnv(SeededTaskEnv):
    """A single task of OGBench's."""

    def __init__(
        self, env: gymnasium.Env[Any, np.ndarray], text: str, steps: int, *, dense: bool = False
    ) -> None:
        """Wrap `env`; `text` is what a policy is told, `dense` leaves OGBench's own rewards."""
        super().__init__(env, steps)
        self.task_text, self._dense = text, dense

    def state_of(self, observation: Any) -> np.ndarray:
        """As OGBench's data has it."""
        return np.asarray(observation, np.float32)

    def succeeded(self, info: Mapping[str, Any]) -> bool:
        """Of the state that the last step started from."""
        return bool(info["success"])

    def reward_of(self, own: float, success: bool) -> float:
        """Of the state that the last step started from."""
        return own if self._dense else super().reward_of(own, success)


def _make(task: str, text: str, steps: int, dense: bool, rendering: bool) -> OGBenchEnv:
    size = {"width": FRAME_SIZE, "height": FRAME_SIZE} if rendering else {}
    env = make_ogbench(task, max_episode_steps=steps, **size)
    return OGBenchEnv(env, text, steps, dense=dense)


def make_ogbench(task: str, **settings: Any) -> gymnasium.Env[Any, np.ndarray]:
    """OGBench's own environment of a task, its rewards those of the state before the action."""
    if "width" in settings:
        # mujoco reads it when it is imported, and without a display finds nothing by itself.
        os.environ.setdefault("MUJOCO_GL", "egl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32 limits of float64 boxes, render modes
        import ogbench

        try:
            env: gymnasium.Env[Any, np.ndarray] = ogbench.make_env_and_datasets(
                task, env_only=True, disable_env_checker=True, **settings
            )
        except gymnasium.error.Error as error:
            raise UserError(f"--env.task={task} is no task of OGBench's: {error}") from None
        keep_action_space(env.unwrapped)
    return env


def keep_action_space(env: gymnasium.Env[Any, np.ndarray]) -> None:
    """Makes it one object, so that it can be seeded.

    The arm's tasks make a new one at every look, and a reset executes two of its random actions.
    """
    kind = type(env)
    if isinstance(getattr(kind, "action_space", None), property):
        env.__class__ = type(kind.__name__, (kind,), {"action_space": env.action_space})


def _control_rate(env: gymnasium.Env[Any, np.ndarray]) -> float:
    """Hz: of a maze gymnasium's `dt`, of the arm's tasks OGBench's own time step."""
    inner: Any = env.unwrapped
    seconds = inner.dt if hasattr(inner, "dt") else inner._control_timestep
    return round(1.0 / float(seconds), 6)

"""The seam of tasks: what a run asks of a simulator, whichever it is.

A simulator comes in by one function that turns settings into an `EnvFamily`, and one class, a
`TaskEnv`. `tests/envs/family_contract.py` holds what each must keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from vla_trqam.envs.seeding import global_seed
from vla_trqam.errors import UserError

Limit = float | tuple[float, ...]


class TaskEnv(gymnasium.Wrapper[np.ndarray, np.ndarray, Any, np.ndarray], ABC):
    """A task's environment as a simulator process plays it.

    Observations are states, (O,) float32; actions (A,) lie within the box `action_space`. An
    episode is a function of its reset's seed and its actions. The reward is 1 on the step that
    succeeds, which ends the episode, and else 0, unless the family was asked for the simulator's
    own; `info["is_success"]` is a bool at every step.

    Attributes:
        task_text: what a policy is told in the episode under way.
    """

    task_text: str

    def look(self) -> dict[str, np.ndarray]:
        """What the cameras see now: name -> (height, width, 3) uint8; {} without cameras."""
        return {}

    @abstractmethod
    def frame(self, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 for people, of an environment that was made to render."""


MakeEnv = Callable[[bool], TaskEnv]
"""Picklable; called in a simulator process with whether frames will be asked for."""


@dataclass(frozen=True)
class EnvFamily:
    """A task (or a suite of them) of one simulator, known before any process has made it.

    Attributes:
        name: the simulator's, as ``--env.type`` has it.
        task: the task's name there.
        make: what a simulator process calls.
        max_episode_steps: control steps after which an episode is truncated.
        control_rate: control steps a second.
        task_texts: what a policy may be told; which of them, the episode says.
        action_low: least action that is executed, of each dimension.
        action_high: largest.
        state_size: O; None where only the made environment knows it.
        cameras: name -> (height, width, 3) of the images that are handed on; {} where states are
            all there is.
        notes: what who reads its success rates must know, a sentence each.
    """

    name: str
    task: str
    make: MakeEnv
    max_episode_steps: int
    control_rate: float
    task_texts: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    state_size: int | None = None
    cameras: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_episode_steps < 1:
            raise UserError(
                f"max_episode_steps is {self.max_episode_steps}; it must be at least 1."
            )

    def showing(self, cameras: Collection[str]) -> EnvFamily:
        """Of what it shows, these cameras alone; those that it lacks are for others to miss."""
        shown = {name: shape for name, shape in self.cameras.items() if name in cameras}
        return replace(self, cameras=shown)

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.action_low)

    @property
    def action_limits(self) -> tuple[Limit, Limit]:
        """Least and largest action: one number where it is that of all dimensions."""
        return _one_or_all(self.action_low), _one_or_all(self.action_high)


class SeededTaskEnv(TaskEnv):
    """A `TaskEnv` of a gymnasium environment that has other observations and rewards."""

    def __init__(self, env: gymnasium.Env[Any, np.ndarray], max_episode_steps: int) -> None:
        """Wrap `env`, which is asked for its observations at the first reset."""
        super().__init__(env)
        self._max_episode_steps, self._steps = max_episode_steps, 0

    @abstractmethod
    def state_of(self, observation: Any) -> np.ndarray:
        """(O,) float32."""

    @abstractmethod
    def succeeded(self, info: Mapping[str, Any]) -> bool:
        """Whether the last step solved the task."""

    def reward_of(self, own: float, success: bool) -> float:
        """Of the last step: 1 for success and else 0, whatever the simulator's own is."""
        return float(success)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the episode of a seed, which is not left to chance: it must be given."""
        assert seed is not None, "an episode is a function of its seed"
        with global_seed(seed):  # the mazes draw from there
            self.env.action_space.seed(seed)  # and take random actions before they start
            observation, _ = self.env.reset(seed=seed, options=options)
        self._steps = 0
        return self.state_of(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute one control step."""
        observation, own, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        success = self.succeeded(info)
        ended = success or bool(terminated)
        cut = not ended and (bool(truncated) or self._steps >= self._max_episode_steps)
        reward = self.reward_of(float(own), success)
        return self.state_of(observation), reward, ended, cut, {"is_success": success}

    def frame(self, height: int, width: int) -> np.ndarray:
        """What the environment renders, scaled to that size."""
        image = np.asarray(self.env.render(), dtype=np.uint8)
        if image.shape == (height, width, 3):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height)))


def _one_or_all(limits: tuple[float, ...]) -> Limit:
    return limits[0] if len(set(limits)) == 1 else limits

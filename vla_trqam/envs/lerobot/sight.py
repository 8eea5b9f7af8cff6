"""LeRobot's environments that render at every step, kept from it where nobody looks.

A frame costs far more than a step of the physics. Each of these stops an environment from
rendering in `reset` and `step`, and renders when it is asked to, with the numbers of its own code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Sight(ABC):
    """Eyes of one environment, closed."""

    def __init__(self, env: Any) -> None:
        """Close them.

        Args:
            env: LeRobot's, unwrapped.
        """
        self.env = env

    @abstractmethod
    def open(self) -> Any:
        """The observation of the state that it is in, rendered now."""


class SightByType(Sight):
    """Of PushT: its `obs_type` says what an observation holds."""

    BLIND, SEEING = "environment_state_agent_pos", "pixels_agent_pos"

    def __init__(self, env: Any) -> None:
        """Ask for numbers alone."""
        super().__init__(env)
        env.obs_type = self.BLIND

    def open(self) -> Any:
        """Ask for pictures for a moment."""
        self.env.obs_type = self.SEEING
        observation = self.env.get_obs()
        self.env.obs_type = self.BLIND
        return observation


class SightByFormat(Sight):
    """Of Meta-World: its `_format_raw_obs` renders, and keeps of the numbers those of the hand.

    Attributes:
        numbers: (39,) all of them, of the last state: the hand's, and where the objects are.
    """

    def __init__(self, env: Any) -> None:
        """Have it keep the numbers for later."""
        super().__init__(env)
        self._render, self.numbers = type(env)._format_raw_obs, np.empty(0)
        self._dark = np.zeros((env.observation_height, env.observation_width, 3), np.uint8)
        env._format_raw_obs = self._keep
        rendered = env.render

        def render() -> Any:
            self._focus()
            return rendered()

        env.render = render

    def open(self) -> Any:
        """As its own code has it, of the numbers of the last step."""
        self._focus()
        return self._render(self.env, self.numbers)

    def _focus(self) -> None:
        """Draw with what was loaded for this environment.

        Gymnasium's renderer leaves the graphics context of whoever was made last, so that of
        several environments in one process each would draw with the meshes and textures of another.
        """
        inner = self.env._env
        viewer = None if inner is None else inner.mujoco_renderer.viewer
        if viewer is not None:
            viewer.make_context_current()

    def _keep(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        self.numbers = raw
        return {"pixels": self._dark, "agent_pos": raw[:4]}

"""Robomimic's tasks as a family of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vla_trqam.envs.base import EnvFamily, TaskEnv
from vla_trqam.envs.robomimic.env import RobomimicEnv
from vla_trqam.envs.robomimic.env_meta import (
    LOW_DIM_KEYS,
    TASK_DESCRIPTIONS,
    check_env_meta,
    require_robosuite,
)
from vla_trqam.envs.robomimic.images import (
    ACTION_DIM,
    STATE_DIM,
    STATE_KEYS,
    Cameras,
    CameraSettings,
)

DEFAULT_CONTROL_RATE = 20
"""robosuite's, in Hz, for `env_args` that name none."""


def robomimic_family(
    env_meta: Mapping[str, Any],
    *,
    max_episode_steps: int,
    obs_keys: Sequence[str] = LOW_DIM_KEYS,
    cameras: CameraSettings | None = None,
    action_size: int = ACTION_DIM,
    fast_step: bool | None = None,
) -> EnvFamily:
    """A task of robomimic's, arguments as `RobomimicEnv`'s; `cameras` None is for states alone.

    The size of an action is that of one arm and its gripper unless another is given.

    Raises:
        UserError: a number below 1, `env_meta` cannot be honoured, or robosuite is not installed.
    """
    check_env_meta(env_meta)
    require_robosuite()
    task = str(env_meta["env_name"])
    size = 0 if cameras is None else cameras.image_size
    return EnvFamily(
        name="robomimic",
        task=task,
        make=partial(
            _make,
            dict(env_meta),
            max_episode_steps=max_episode_steps,
            obs_keys=tuple(obs_keys),
            cameras=cameras,
            fast_step=fast_step,
        ),
        max_episode_steps=max_episode_steps,
        control_rate=env_meta["env_kwargs"].get("control_freq", DEFAULT_CONTROL_RATE),
        task_texts=(TASK_DESCRIPTIONS.get(task, task),),
        action_low=(-1.0,) * action_size,
        action_high=(1.0,) * action_size,
        state_size=STATE_DIM if tuple(obs_keys) == STATE_KEYS else None,
        cameras={} if cameras is None else dict.fromkeys(cameras.names, (size, size, 3)),
    )


def _make(
    env_meta: dict[str, Any], rendering: bool, *, cameras: CameraSettings | None, **settings: Any
) -> RobomimicTaskEnv:
    env = RobomimicEnv(env_meta, render_offscreen=rendering or cameras is not None, **settings)
    return RobomimicTaskEnv(env, cameras)


class RobomimicTaskEnv(TaskEnv):
    """`RobomimicEnv`, which keeps all that is asked, with what its cameras see."""

    def __init__(self, env: RobomimicEnv, cameras: CameraSettings | None) -> None:
        """Wrap `env`, which was made to render where there are cameras."""
        super().__init__(env)
        self.task_text = env.task_description
        self._robomimic = env
        self._cameras = None if cameras is None else Cameras(env, cameras)

    def look(self) -> dict[str, np.ndarray]:
        """Rendered now."""
        return self._cameras.look() if self._cameras else {}

    def frame(self, height: int, width: int) -> np.ndarray:
        """The view of `RobomimicEnv.render_camera`."""
        self._robomimic.render_height, self._robomimic.render_width = height, width
        return self._robomimic.render()

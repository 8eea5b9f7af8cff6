"""Robomimic for LeRobot: `lerobot-eval --env.type=robomimic`, which knows nothing of this package.

The package `lerobot_env_robomimic` imports this module where LeRobot looks for plugins. The import
registers the config and the gymnasium ids `lerobot_env_robomimic/<task>`; the simulator is imported
when an environment is made.

What stock `lerobot-eval` does with it (LeRobot 0.6.1):

- Episode i starts from seed `--seed` + i (1000 + i by default), whatever the batch size. The seed
  alone decides the initial state, the same as everywhere in this package.
- The policy executes `n_action_steps` actions of a chunk and looks again. The episodes of a batch
  begin together, so all look after the same steps, and `render_every=n_action_steps` leaves out
  only frames that nobody sees. LeRobot asks for a video frame at every step; it gets the last one.
- The flow's noise comes from torch's global generator, seeded once. So the noise of an episode is
  not that of a rollout here (a function of the episode's seed and the chunk's number), and another
  batch size gives other noise: rates of success agree within their intervals, not episode by
  episode.
- Success at any step is success, and so is it here: it ends the episode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from vla_trqam.envs.robomimic.env_meta import TASK_DESCRIPTIONS, Task, env_meta_for
from vla_trqam.envs.robomimic.images import (
    ACTION_DIM,
    CAMERAS,
    STATE_DIM,
    STATE_KEYS,
    RobomimicImageEnv,
)
from vla_trqam.errors import UserError

PLUGIN = "lerobot_env_robomimic"


@EnvConfig.register_subclass("robomimic")
@dataclass
class RobomimicEnvConfig(EnvConfig):
    """The flags `--env.*` of `--env.type=robomimic`.

    A policy sees `observation.state` (9,), see `images.STATE_KEYS`, and
    `observation.images.<camera>`; it gives 7 numbers in [-1, 1]: the change of the gripper's
    position and orientation, and the fingers.

    Attributes:
        task: Lift, PickPlaceCan or NutAssemblySquare.
        fps: control steps per second; robosuite's, not to be changed.
        episode_length: steps after which an episode fails.
        cameras: of the robosuite model.
        image_size: height and width in pixels.
        render_every: steps from frame to frame. Set it to the policy's `n_action_steps`: it looks
            at no other, and rendering is most of the time. 1 is right for every policy.
        shadows: and reflections, as in the images that the policy was trained on.
        video_size: pixels of the videos; None shows what the first camera saw, at no cost.
    """

    task: str | None = "Lift"
    fps: int = 20
    episode_length: int = 200
    cameras: list[str] = field(default_factory=lambda: list(CAMERAS))
    image_size: int = 64
    render_every: int = 1
    shadows: bool = True
    video_size: int | None = None

    def __post_init__(self) -> None:
        if self.task not in TASK_DESCRIPTIONS:
            known = ", ".join(TASK_DESCRIPTIONS)
            raise UserError(f"--env.task is {self.task!r}; choose one of {known}.")
        image = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
        images = {f"{OBS_IMAGES}.{camera}": image for camera in self.cameras}
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            **images,
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE} | {key: key for key in images}

    @property
    def package_name(self) -> str:
        """The package whose import registers the ids."""
        return PLUGIN

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment."""
        return {
            "episode_length": self.episode_length,
            "cameras": tuple(self.cameras),
            "image_size": self.image_size,
            "render_every": self.render_every,
            "shadows": self.shadows,
            "video_size": self.video_size,
        }

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv[Any, Any, Any]]]:
        """{"robomimic": {0: vector environment}}.

        Unlike LeRobot's default, an environment whose episode has ended waits for the others
        instead of simulating and rendering another one that nobody counts.
        """
        make = freeze_after_episode_end(partial(_make, self.gym_id, self.gym_kwargs))
        vector: gymnasium.vector.VectorEnv[Any, Any, Any]
        if use_async_envs and n_envs > 1:
            vector = gymnasium.vector.AsyncVectorEnv([make] * n_envs, context="forkserver")
        else:
            vector = gymnasium.vector.SyncVectorEnv([make] * n_envs)
        return {self.type: {0: vector}}


class LeRobotRobomimicEnv(gymnasium.Wrapper[Any, np.ndarray, Any, np.ndarray]):
    """`RobomimicImageEnv` as gymnasium's registry makes it, for one of the tasks."""

    def __init__(self, task: Task, *, episode_length: int, **settings: Any) -> None:
        """Build it; `settings` are those of `RobomimicImageEnv`."""
        super().__init__(
            RobomimicImageEnv(
                env_meta_for(task),
                max_episode_steps=episode_length,
                state_keys=STATE_KEYS,
                **settings,
            )
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; LeRobot's mark of a new rollout is not for the simulator."""
        ours = {k: v for k, v in (options or {}).items() if k != NEW_ROLLOUT_OPTION}
        return self.env.reset(seed=seed, options=ours)


def _make(gym_id: str, settings: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """In a worker process, importing this function is what registers the id."""
    return gymnasium.make(gym_id, disable_env_checker=True, **settings)


for _task in TASK_DESCRIPTIONS:
    gymnasium.register(
        f"{PLUGIN}/{_task}",
        entry_point=f"{__name__}:LeRobotRobomimicEnv",
        kwargs={"task": _task},
    )

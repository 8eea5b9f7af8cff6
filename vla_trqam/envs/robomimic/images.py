"""Robomimic tasks with cameras, rendered only where the policy decides.

A frame costs 50-90 ms on a CPU whatever its size: several times a control step. A policy that
executes n actions of a chunk looks at every n-th state only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np

from vla_trqam.envs.robomimic.env import RobomimicEnv
from vla_trqam.errors import UserError

STATE_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
"""What the robot feels of itself, 9 numbers: the gripper's position in the world (x, y, z in m),
its orientation (quaternion x, y, z, w), and the two finger joints (m). Objects are seen."""

STATE_DIM, ACTION_DIM = 9, 7
CAMERAS = ("agentview", "robot0_eye_in_hand")

ImageObservation = dict[str, Any]
"""{"agent_pos": (S,) float32, "pixels": {camera: (height, width, 3) uint8}}, as LeRobot's
environments have it; LeRobot calls them `observation.state` and `observation.images.<camera>`."""


@dataclass(frozen=True)
class CameraSettings:
    """What cameras show.

    Attributes:
        names: cameras of the robosuite model.
        image_size: height and width in pixels.
        shadows: and reflections. Without them a frame takes half the time on a CPU; most pixels
            change by less than 2 of 255.
    """

    names: tuple[str, ...] = CAMERAS
    image_size: int = 64
    shadows: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; it must be at least 1.")
        if not self.names:
            raise UserError("cameras is empty; name one at least, or use RobomimicEnv.")


class Cameras:
    """Renders what a simulator's cameras see now."""

    def __init__(self, env: RobomimicEnv, settings: CameraSettings) -> None:
        """Cameras of an environment that was made with `render_offscreen`.

        Raises:
            UserError: the task has no camera of such a name.
        """
        known = env.robosuite.sim.model.camera_names
        unknown = [camera for camera in settings.names if camera not in known]
        if unknown:
            raise UserError(f"{env.task} has no camera {unknown}; it has {sorted(known)}.")
        self._env, self.settings = env, settings

    def look(self) -> dict[str, np.ndarray]:
        """Name -> (height, width, 3) uint8."""
        return {name: self.frame(name, self.settings.image_size) for name in self.settings.names}

    def frame(self, name: str, size: int) -> np.ndarray:
        """(size, size, 3) uint8."""
        import mujoco  # here, for a trainer needs the settings alone

        flags = self._env.robosuite.sim._render_context_offscreen.scn.flags
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            flags[effect] = self.settings.shadows
        image = self._env.robomimic.render(
            mode="rgb_array", height=size, width=size, camera_name=name
        )
        return np.ascontiguousarray(image, dtype=np.uint8)


class RobomimicImageEnv(gymnasium.Wrapper[ImageObservation, np.ndarray, Any, np.ndarray]):
    """A `RobomimicEnv` with images; everything but the observation is as there.

    Images are new on the first observation, after every `render_every`-th step, and where the
    step limit cuts the episode; in between they are the last ones taken. `info["frame_is_new"]`
    tells. The numbers do not depend on `render_every`.
    """

    def __init__(
        self,
        env_meta: Mapping[str, Any],
        *,
        max_episode_steps: int,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 64,
        render_every: int = 1,
        state_keys: Sequence[str] = STATE_KEYS,
        fast_step: bool | None = None,
        video_size: int | None = None,
        shadows: bool = True,
    ) -> None:
        """Build the simulator and open a GL context (`MUJOCO_GL` egl or osmesa).

        Arguments are `RobomimicEnv`'s and those of `CameraSettings`; `render_every` are the steps
        from frame to frame, the number of actions executed of a chunk, and `video_size` the pixels
        of `render`'s own frames: None shows what the first camera saw last, which costs nothing.

        Raises:
            UserError: a number below 1, an unknown or missing camera, or as `RobomimicEnv`.
        """
        if render_every < 1:
            raise UserError(f"render_every is {render_every}; it must be at least 1.")
        settings = CameraSettings(tuple(cameras), image_size, shadows)
        env = RobomimicEnv(
            env_meta,
            max_episode_steps=max_episode_steps,
            obs_keys=state_keys,
            fast_step=fast_step,
            render_offscreen=True,
        )
        super().__init__(cast(gymnasium.Env[Any, np.ndarray], env))  # which has other observations
        self._robomimic = env
        self._view = Cameras(env, settings)
        self.cameras, self.image_size = settings.names, image_size
        self._render_every, self._video_size = render_every, video_size
        self._steps = 0
        self._images: dict[str, np.ndarray] = {}
        pixels = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "agent_pos": env.observation_space,
                "pixels": gymnasium.spaces.Dict(dict.fromkeys(self.cameras, pixels)),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ImageObservation, dict[str, Any]]:
        """Start an episode; arguments and errors as `RobomimicEnv.reset`."""
        state, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._look()
        return self._observation(state), info | {"frame_is_new": True}

    def step(
        self, action: np.ndarray
    ) -> tuple[ImageObservation, float, bool, bool, dict[str, Any]]:
        """Execute one control step; errors as `RobomimicEnv.step`."""
        state, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        # After success nobody looks; where the limit cuts, RL still asks what this state is worth.
        new = not terminated and (truncated or self._steps % self._render_every == 0)
        if new:
            self._look()
        observation = self._observation(state)
        return observation, float(reward), terminated, truncated, info | {"frame_is_new": new}

    def render(self) -> np.ndarray:
        """(height, width, 3) uint8: the first camera, see `video_size`."""
        if self._video_size is None:
            return self._images[self.cameras[0]]
        return self._view.frame(self.cameras[0], self._video_size)

    def look_again(self) -> ImageObservation:
        """What is seen now, with images that are new."""
        self._look()
        return self._observation(self._state)

    def object_poses(self) -> np.ndarray:
        """The poses of the objects now (`object` of robosuite), (O,)."""
        return np.asarray(self._robomimic.robosuite._get_observations()["object-state"])

    def _look(self) -> None:
        self._images = self._view.look()

    def _observation(self, state: Any) -> ImageObservation:
        self._state = state
        return {"agent_pos": state, "pixels": dict(self._images)}

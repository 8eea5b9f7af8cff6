"""Robomimic tasks as gymnasium environments, made by robomimic's own code from `env_args`.

Nothing here imports robosuite or robomimic at module level: that costs seconds, and reading a file
or training on it needs neither.
"""

import contextlib
import io
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from vla_trqam.envs.robomimic.env_meta import (
    LOW_DIM_KEYS,
    TASK_DESCRIPTIONS,
    Task,
    check_env_meta,
    env_meta_for,
    require_robosuite,
)
from vla_trqam.envs.seeding import global_seed
from vla_trqam.errors import UserError

if TYPE_CHECKING:
    from vla_trqam.envs.robomimic.osc_step import OscStep

__all__ = [
    "LOW_DIM_KEYS",
    "TASK_DESCRIPTIONS",
    "RobomimicEnv",
    "Task",
    "check_env_meta",
    "create_robomimic_env",
    "env_meta_for",
]


ROBOSUITE_GL_PLATFORMS = ("egl", "osmesa", "glx")


def _check_gl_platform() -> None:
    """Refuse what robosuite would silently replace by EGL.

    Raises:
        UserError: `MUJOCO_GL` names another platform.
    """
    platform = os.environ.get("MUJOCO_GL", "egl")
    if sys.platform == "linux" and platform not in ROBOSUITE_GL_PLATFORMS:
        raise UserError(
            f"robosuite cannot render with MUJOCO_GL={platform}; "
            f"choose one of {', '.join(ROBOSUITE_GL_PLATFORMS)}, or unset it for egl."
        )


@contextlib.contextmanager
def _gl_choice_kept() -> Iterator[None]:
    """Keep `MUJOCO_GL` as the user has it.

    Importing robosuite sets it to egl. Inherited by a worker, that makes `import mujoco` fail on
    machines without an EGL library, though low-dimensional environments need no GL at all.

    Raises:
        UserError: the user's choice has no library, so that mujoco does not import.
    """
    chosen = os.environ.get("MUJOCO_GL")
    try:
        yield
    except (ImportError, AttributeError) as error:  # PyOpenGL without a library: AttributeError
        if chosen is None:
            raise
        raise UserError(
            f"The simulators do not import with MUJOCO_GL={chosen} ({error}); "
            f"install its GL library or unset MUJOCO_GL."
        ) from error
    finally:
        if chosen is None:
            os.environ.pop("MUJOCO_GL", None)


def _stand_in_for_mujoco_py() -> None:
    """Give robomimic 0.3 the one name it takes from mujoco_py, which Python 3.12 cannot install."""
    if "mujoco_py" in sys.modules:
        return
    builder = types.ModuleType("mujoco_py.builder")
    builder.MujocoException = type("MujocoException", (Exception,), {})  # type: ignore[attr-defined]
    package = types.ModuleType("mujoco_py")
    package.builder = builder  # type: ignore[attr-defined]
    sys.modules["mujoco_py"] = package
    sys.modules["mujoco_py.builder"] = builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep advice about private macro files and the like off a training run's terminal."""
    logger = logging.getLogger("robosuite_logs")
    if not any(f is _errors_only for f in logger.filters):
        logger.addFilter(_errors_only)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def create_robomimic_env(env_meta: Mapping[str, Any], *, render_offscreen: bool = False) -> Any:
    """A stock robomimic `EnvRobosuite`, made by robomimic's own function.

    Args:
        env_meta: a file's `env_args`, see `env_meta_for`.
        render_offscreen: open a GL context, so that `render(mode="rgb_array")` works.

    Raises:
        UserError: see `check_env_meta` and `require_robosuite`; an unknown task; or GL cannot
            start.
    """
    check_env_meta(env_meta)
    require_robosuite()
    if render_offscreen:
        _check_gl_platform()
    _stand_in_for_mujoco_py()
    with _quiet():
        with _gl_choice_kept():
            import robomimic.utils.env_utils as env_utils
            import robomimic.utils.obs_utils as obs_utils
            import robosuite
        if env_meta["env_name"] not in robosuite.ALL_ENVIRONMENTS:
            known = ", ".join(sorted(robosuite.ALL_ENVIRONMENTS))
            raise UserError(f"robosuite has no task {env_meta['env_name']!r}; it has {known}.")
        obs_utils.initialize_obs_utils_with_obs_specs(
            {"obs": {"low_dim": list(LOW_DIM_KEYS), "rgb": []}}
        )
        try:
            return env_utils.create_env_from_metadata(env_meta, render_offscreen=render_offscreen)
        except (ImportError, AttributeError, RuntimeError) as error:
            if not render_offscreen:
                raise
            raise UserError(
                f"Off-screen rendering does not start ({type(error).__name__}: {error}); "
                f"install EGL or OSMesa and set MUJOCO_GL to egl or osmesa."
            ) from error


class RobomimicEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One robomimic task; one step is one control step (1/20 s in the official files).

    Observation: `obs_keys` of robomimic's dictionary concatenated, (O,) float32.
    Action: (A,) in [-1, 1]; what lies outside is clipped, as robosuite's controller does.
    Reward: 1.0 on the step that reaches success, else 0.0. Success terminates the episode;
    `max_episode_steps` truncates it. `info["is_success"]` is a bool at every step.

    The initial state is a function of the reset's seed alone: not of the process, nor of what
    happened in this environment before. It is the state that robosuite's own rebuild of the model
    gives under `np.random.seed(seed)`, without rebuilding (3-6 ms instead of 170-250 ms).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        env_meta: Mapping[str, Any],
        *,
        max_episode_steps: int,
        obs_keys: Sequence[str] = LOW_DIM_KEYS,
        fast_step: bool | None = None,
        render_offscreen: bool = False,
    ) -> None:
        """Build the simulator.

        Args:
            env_meta: a file's `env_args`, see `env_meta_for`.
            max_episode_steps: control steps after which an episode is truncated.
            obs_keys: robomimic observation keys, in the order of concatenation.
            fast_step: use `osc_step.OscStep`, equal to the stock step and several times as fast;
                None where the robot and its controller are of the kind that it does.
            render_offscreen: make `render` available.

        Raises:
            UserError: `env_meta` cannot be honoured, a key is unknown, or `fast_step` is asked for
                with a controller other than the Panda's fixed-impedance OSC_POSE.
        """
        if max_episode_steps < 1:
            raise UserError(f"max_episode_steps is {max_episode_steps}; it must be at least 1.")
        self.robomimic = create_robomimic_env(env_meta, render_offscreen=render_offscreen)
        self.robosuite = self.robomimic.env
        self.robosuite.hard_reset = False  # resets below give the same states; tests prove it
        self.obs_keys = tuple(obs_keys)
        self.task = str(env_meta["env_name"])
        self.task_description = TASK_DESCRIPTIONS.get(self.task, self.task)
        self.metadata = {**self.metadata, "render_fps": int(self.robosuite.control_freq)}
        self.render_mode = "rgb_array" if render_offscreen else None
        self.render_height, self.render_width, self.render_camera = 256, 256, "agentview"
        self._max_episode_steps = max_episode_steps
        self._steps = 0
        self._fast = None if fast_step is False else self._make_fast_step(needed=bool(fast_step))
        first_observation = self._vector(self._reset_scene(0))
        self.observation_space = gymnasium.spaces.Box(
            -np.inf, np.inf, first_observation.shape, np.float32
        )
        self.action_space = gymnasium.spaces.Box(
            -1.0, 1.0, (self.robomimic.action_dimension,), np.float32
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of the initial state. None draws one from this environment's own generator, which
                the last given seed started.
            options: `{"state": array}` puts the simulator into a flattened MuJoCo state
                (time, qpos, qvel: what robomimic's files call `states`) instead of a drawn one.

        Returns:
            The observation (O,) and `{"is_success": bool}`.

        Raises:
            UserError: an unknown option or a state of another length.
        """
        super().reset(seed=seed)
        unknown = set(options or {}) - {"state"}
        if unknown:
            raise UserError(f"reset options {sorted(unknown)} are unknown; only 'state' is.")
        scene_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        observation = self._reset_scene(scene_seed)
        if options and "state" in options:
            observation = self._set_state(np.asarray(options["state"], dtype=np.float64))
        self._steps = 0
        if self._fast is not None:
            self._fast.start_episode()
        return self._vector(observation), {"is_success": self._is_success()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute one control step.

        Args:
            action: (A,), clipped to [-1, 1] before it is executed.

        Raises:
            ValueError: the action has another shape or is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action must be {self.action_space.shape} finite numbers: {action}")
        observation = self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        success = self._is_success()
        truncated = not success and self._steps >= self._max_episode_steps
        return observation, float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """The view of `render_camera` as (height, width, 3) uint8.

        Raises:
            UserError: the environment was made without `render_offscreen`.
        """
        if self.render_mode is None:
            raise UserError("This environment was made without render_offscreen=True.")
        frame = self.robomimic.render(
            mode="rgb_array",
            height=self.render_height,
            width=self.render_width,
            camera_name=self.render_camera,
        )
        return np.ascontiguousarray(frame, dtype=np.uint8)

    def sim_state(self) -> np.ndarray:
        """The flattened MuJoCo state (time, qpos, qvel) that `reset(options=...)` takes."""
        return np.array(self.robosuite.sim.get_state().flatten())

    def close(self) -> None:
        """Release the simulator; a second call does nothing."""
        if self.robosuite.sim is not None:
            self.robosuite.close()

    def _make_fast_step(self, *, needed: bool) -> "OscStep | None":
        with _quiet():
            from vla_trqam.envs.robomimic.osc_step import OscStep, UnsupportedError

        try:
            return OscStep(self.robosuite, self.obs_keys)
        except UnsupportedError:
            if needed:
                raise
            return None

    def _reset_scene(self, seed: int) -> dict[str, np.ndarray]:
        with global_seed(seed):
            if self.task == "Lift":
                from vla_trqam.envs.robomimic.lift_cube import resample_cube_size

                resample_cube_size(self.robosuite)
            self.robomimic.reset()
        return self._fresh_observation()

    def _set_state(self, state: np.ndarray) -> dict[str, np.ndarray]:
        expected = self.sim_state().shape
        if state.shape != expected:
            raise UserError(f"The state has shape {state.shape}; {self.task} needs {expected}.")
        sim = self.robosuite.sim
        sim.set_state_from_flattened(state)
        sim.forward()
        for robot in self.robosuite.robots:
            for arm in robot.arms:
                # The null space pulls the arm towards its first pose, which must be this state's.
                controller = robot.part_controllers[arm]
                controller.update_initial_joints(sim.data.qpos[controller.qpos_index])
        return self._fresh_observation()

    def _fresh_observation(self) -> dict[str, np.ndarray]:
        """Sample every sensor from the present state, independent of earlier samples.

        Twice, because the relative poses of robosuite 1.5.1 use the object's previous sample:
        robomimic's rollouts sample twice too, by `reset` followed by `reset_to`.
        """
        self.robosuite._obs_cache = {}
        for observable in self.robosuite._observables.values():
            observable.reset()
        self.robomimic.get_observation()
        observation: dict[str, np.ndarray] = self.robomimic.get_observation()
        return observation

    def _advance(self, action: np.ndarray) -> np.ndarray:
        if self._fast is not None:
            self._fast.step(action)
            return self._fast.observation().astype(np.float32)
        return self._vector(self.robomimic.step(action)[0])

    def _vector(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        missing = [key for key in self.obs_keys if key not in observation]
        if missing:
            raise UserError(f"{self.task} has no observation {missing}; it has {set(observation)}.")
        parts = [np.atleast_1d(observation[key]) for key in self.obs_keys]
        return np.concatenate(parts).astype(np.float32)

    def _is_success(self) -> bool:
        return bool(self.robomimic.is_success()["task"])

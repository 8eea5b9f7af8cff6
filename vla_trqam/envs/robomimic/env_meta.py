"""What a robomimic file says about its task: `env_args`, made or checked without a simulator."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from vla_trqam.envs.robomimic.env_kwargs import check_env_kwargs, check_task_name
from vla_trqam.errors import UserError

LOW_DIM_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""What robomimic's low-dimensional policies see: 19 numbers for Lift, 23 for Can and Square."""

Task = Literal["Lift", "PickPlaceCan", "NutAssemblySquare"]

TASK_DESCRIPTIONS = {
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can into its bin",
    "NutAssemblySquare": "put the square nut onto the square peg",
}

ROBOSUITE_SERIES = "1.5"
ROBOSUITE_ENV_TYPE = 1


def env_meta_for(task: Task) -> dict[str, Any]:
    """The `env_args` of a task as the official v1.5 low-dimensional files carry them.

    `damping` and `control_delta` are names of robosuite 1.4 that those files still hold; robosuite
    1.5 ignores them and its defaults (critically damped, delta poses) say the same.

    Args:
        task: `Lift`, `PickPlaceCan` or `NutAssemblySquare`.

    Returns:
        A dictionary that `json.dumps` accepts.

    Raises:
        UserError: for another task.
    """
    if task not in TASK_DESCRIPTIONS:
        raise UserError(f"Task {task!r} is unknown; choose one of {', '.join(TASK_DESCRIPTIONS)}.")
    arm = {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "control_delta": True,
        "interpolation": None,
        "ramp_ratio": 0.2,
        "input_ref_frame": "world",
        "gripper": {"type": "GRIP"},
    }
    env_kwargs = {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": {"type": "BASIC", "body_parts": {"right": arm}},
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "lite_physics": False,
        "reward_shaping": False,
    }
    return {"env_name": task, "env_version": "1.5.1", "type": 1, "env_kwargs": env_kwargs}


def require_robosuite() -> None:
    """Refuse what would fail in every simulator process.

    Raises:
        UserError: robosuite is not installed, or of another series, as LIBERO wants it.
    """
    try:
        found = f"robosuite {version('robosuite')}"
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(f"robosuite {ROBOSUITE_SERIES}."):
        raise UserError(
            f"Robomimic's tasks need robosuite {ROBOSUITE_SERIES}, and {found} is installed: "
            "uv sync --extra robomimic"
        )


def check_env_meta(env_meta: Mapping[str, Any]) -> None:
    """Refuse `env_args` that robosuite 1.5 cannot honour, before anything heavy is imported.

    Raises:
        UserError: a key is missing, the simulator is another one, it is another robosuite, or a
            setting is not one of robosuite's or beyond its range.
    """
    missing = [k for k in ("env_name", "env_version", "type", "env_kwargs") if k not in env_meta]
    if missing:
        raise UserError(f"env_args lack {', '.join(missing)}; robomimic's files carry them all.")
    if env_meta["type"] != ROBOSUITE_ENV_TYPE:
        raise UserError(
            f"env_args have type {env_meta['type']!r}; only robosuite tasks (type 1) are supported."
        )
    recorded = str(env_meta["env_version"])
    if not recorded.startswith(ROBOSUITE_SERIES + "."):
        raise UserError(
            f"env_args were recorded with robosuite {recorded}, whose controller and physics "
            f"differ from the installed {ROBOSUITE_SERIES} series; use the task's v1.5 file."
        )
    try:
        json.dumps(env_meta)
    except TypeError as error:
        raise UserError(f"env_args hold something that JSON cannot: {error}.") from error
    check_task_name(env_meta["env_name"])
    check_env_kwargs(env_meta["env_kwargs"])

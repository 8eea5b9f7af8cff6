"""What a file's ``env_args`` may ask of robosuite: known settings within ranges.

They become arguments of the simulator's constructors, which also take paths of controller files,
classes and sizes of windows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vla_trqam.data.foreign import (
    BOOLEAN,
    NOTHING,
    NUMBER,
    Kind,
    among,
    between,
    shown,
    some,
)
from vla_trqam.errors import UserError

MOST_ROBOTS, MOST_CAMERAS, MOST_AXES = 2, 16, 64
NAME = Kind(
    "a plain name", lambda v: isinstance(v, str) and re.fullmatch(r"\w{1,100}", v) is not None
)
SWITCH = BOOLEAN | NOTHING
LIMIT = between(-1e4, 1e4)
LIMITS = LIMIT | some(LIMIT, MOST_AXES) | some(some(LIMIT, MOST_AXES), MOST_AXES) | NOTHING
PIXELS = between(1, 4096)
ROBOT_NAMES = (
    *("Baxter", "GR1", "GR1ArmsOnly", "GR1FixedLowerBody", "GR1FloatingBody", "IIWA", "Jaco"),
    *("Kinova3", "Panda", "PandaDexLH", "PandaDexRH", "PandaOmron", "Sawyer", "SpotWithArm"),
    *("SpotWithArmFloating", "Tiago", "UR5e"),
)
GRIPPER_NAMES = (
    *("BDGripper", "FourierLeftHand", "FourierRightHand", "InspireLeftHand"),
    *("InspireRightHand", "JacoThreeFingerDexterousGripper", "JacoThreeFingerGripper"),
    *("PandaGripper", "RethinkGripper", "Robotiq140Gripper", "Robotiq85Gripper"),
    *("RobotiqThreeFingerDexterousGripper", "RobotiqThreeFingerGripper", "WipingGripper"),
)
ROBOTS, GRIPPERS = among(*ROBOT_NAMES), among("default", *GRIPPER_NAMES) | NOTHING
CONFIGURATIONS = among(
    *("default", "single-robot", "opposed", "parallel"),
    *("bimanual", "single-arm-opposed", "single-arm-parallel"),
)

# Of one part of a robot; names of robosuite 1.4 are among them, as the v1.5 files still hold some.
PART: Mapping[str, Kind] = {
    "type": among(
        *("OSC_POSE", "OSC_POSITION", "IK_POSE", "GRIP"),
        *("JOINT_POSITION", "JOINT_VELOCITY", "JOINT_TORQUE"),
    ),
    **dict.fromkeys(("uncouple_pos_ori", "control_delta", "use_action_scaling"), SWITCH),
    **dict.fromkeys(("input_max", "input_min", "output_max", "output_min"), LIMITS),
    **dict.fromkeys(("kp", "kp_limits", "damping", "damping_limits"), LIMITS),
    **dict.fromkeys(("damping_ratio", "damping_ratio_limits"), LIMITS),
    **dict.fromkeys(("position_limits", "orientation_limits", "qpos_limits"), LIMITS),
    **dict.fromkeys(("velocity_limits", "torque_limits"), LIMITS),
    **dict.fromkeys(("ik_pos_limit", "ik_ori_limit", "ramp_ratio"), LIMIT | NOTHING),
    "impedance_mode": among("fixed", "variable", "variable_kp"),
    "input_type": among("delta", "absolute"),
    "input_ref_frame": among("world", "base"),
    "interpolation": among("linear") | NOTHING,
}
PARTS = ("right", "left", "arms", "torso", "head", "base", "legs")

ARGUMENTS: Mapping[str, Kind] = {
    **dict.fromkeys(("has_renderer", "has_offscreen_renderer", "ignore_done"), BOOLEAN),
    **dict.fromkeys(("use_object_obs", "use_camera_obs", "reward_shaping", "hard_reset"), BOOLEAN),
    **dict.fromkeys(("lite_physics", "postprocess_visual_obs", "use_latch"), BOOLEAN),
    **dict.fromkeys(("render_collision_mesh", "render_visual_mesh"), BOOLEAN),
    "camera_depths": BOOLEAN | some(BOOLEAN, MOST_CAMERAS),
    **dict.fromkeys(("camera_heights", "camera_widths"), PIXELS | some(PIXELS, MOST_CAMERAS)),
    "camera_names": NAME | some(NAME, MOST_CAMERAS),
    "camera_segmentations": NOTHING | some(NOTHING, MOST_CAMERAS),
    "control_freq": between(1, 1000),
    "env_configuration": CONFIGURATIONS,
    "gripper_types": GRIPPERS | some(GRIPPERS, MOST_ROBOTS),
    "horizon": between(1, 1_000_000),
    "initialization_noise": among("default") | NOTHING,
    "placement_initializer": NOTHING,
    "render_camera": NAME | NOTHING,
    "render_gpu_device_id": between(-1, 1024),
    "renderer": among("mjviewer", "mujoco"),
    "renderer_config": NOTHING,
    "reward_scale": NUMBER | NOTHING,
    "robots": ROBOTS | some(ROBOTS, MOST_ROBOTS),
    "seed": between(0, 2**32 - 1) | NOTHING,
    **dict.fromkeys(("table_full_size", "table_friction"), some(between(0, 100), 3)),
}


def check_env_kwargs(env_kwargs: Any) -> None:
    """Whether these are settings that robomimic's files have, each of a value that it can have.

    Raises:
        UserError: one is not; its name, its value and what it may be.
    """
    if not isinstance(env_kwargs, dict):
        raise UserError(f"env_kwargs are {shown(env_kwargs)}; they must be settings by name.")
    rest = dict(env_kwargs)
    controllers = rest.pop("controller_configs", None)
    _check("env_kwargs", rest, ARGUMENTS)
    several = isinstance(controllers, list) and len(controllers) <= MOST_ROBOTS
    for controller in controllers if several else [controllers]:
        if controller is not None:
            _check_controller("controller_configs", controller)


def check_task_name(name: Any) -> None:
    """Raises a UserError for what cannot be the name of a task."""
    if not NAME.fits(name):
        raise UserError(f"env_name is {shown(name)}; it must be {NAME.name}.")


def _check_controller(where: str, controller: Any) -> None:
    """Of a whole robot, or, as in robosuite 1.4, of its only arm."""
    if not isinstance(controller, dict) or "body_parts" not in controller:
        return _check_part(where, controller)
    rest = dict(controller)
    parts = rest.pop("body_parts")
    _check(where, rest, {"type": among("BASIC", "HYBRID_MOBILE_BASE")})
    return _check_parts(f"{where}.body_parts", parts)


def _check_parts(where: str, parts: Any) -> None:
    if not isinstance(parts, dict):
        raise UserError(f"{where} is {shown(parts)}; it must be settings by name.")
    for name, part in parts.items():
        if name not in PARTS:
            raise UserError(f"{where} has {shown(name)}; known are {', '.join(PARTS)}.")
        check = _check_parts if name == "arms" else _check_part
        check(f"{where}.{name}", part)


def _check_part(where: str, part: Any) -> None:
    rest = dict(part) if isinstance(part, dict) else part
    gripper = rest.pop("gripper", None) if isinstance(rest, dict) else None
    _check(where, rest, PART)
    if gripper is not None:
        _check(f"{where}.gripper", gripper, PART)


def _check(where: str, settings: Any, known: Mapping[str, Kind]) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{where} is {shown(settings)}; it must be settings by name.")
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"{where} has {shown(name)}={shown(value)}, which the files for robosuite 1.5 do "
                "not have."
            )
        if not known[name].fits(value):
            raise UserError(f"{where}.{name} is {shown(value)}; it must be {known[name].name}.")

"""Small files in the layouts of the official robomimic datasets, written by h5py alone."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

WIDTHS = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}

_OSC = {"type": "OSC_POSE", "input_max": 1, "input_min": -1, "kp": 150, "control_delta": True}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "1.4.1": _OSC,
    "1.5.1": {"type": "BASIC", "body_parts": {"right": {**_OSC, "gripper": {"type": "GRIP"}}}},
}


def env_args(version: str = "1.5.1") -> dict[str, Any]:
    return {
        "env_name": "Lift",
        "env_version": version,
        "type": 1,
        "env_kwargs": {
            "controller_configs": CONTROLLERS[version],
            "control_freq": 20,
            "robots": ["Panda"],
            "reward_shaping": False,
        },
    }


def add_demo(
    data: h5py.Group,
    number: int,
    *,
    num_steps: int,
    first_success: int | None,
    next_obs: bool = True,
) -> None:
    """The official convention: reward and done are 1 on every row from the first success on."""
    rng = np.random.default_rng(number)
    demo = data.create_group(f"demo_{number}")
    demo.attrs["num_samples"] = num_steps
    demo.attrs["model_file"] = "<mujoco/>"
    demo["actions"] = rng.uniform(-1, 1, (num_steps, 7))
    rewards = np.zeros(num_steps)
    if first_success is not None:
        rewards[first_success:] = 1
    demo["rewards"] = rewards
    demo["dones"] = rewards.astype(np.int64)
    demo["states"] = rng.normal(size=(num_steps, 32))
    for key, width in WIDTHS.items():
        values = rng.normal(size=(num_steps + 1, width))
        demo[f"obs/{key}"] = values[:-1]
        if next_obs:
            demo[f"next_obs/{key}"] = values[1:]


def write_file(
    path: Path,
    add_demos: Callable[[h5py.Group], None],
    *,
    masks: Mapping[str, list[str]] | None = None,
    version: str = "1.5.1",
) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args(version), indent=4)
        add_demos(data)
        data.attrs["total"] = sum(demo.attrs["num_samples"] for demo in data.values())
        for key, names in (masks or {}).items():
            file[f"mask/{key}"] = np.array(names, dtype="S")
    return path


def write_ph(path: Path, *, version: str = "1.5.1", next_obs: bool = True) -> Path:
    """Proficient human: all succeed and go on for four rows."""

    def add(data: h5py.Group) -> None:
        for number in range(12):
            steps = 10 + number
            add_demo(data, number, num_steps=steps, first_success=steps - 5, next_obs=next_obs)

    masks = {
        "train": [f"demo_{i}" for i in range(10)],
        "valid": ["demo_11", "demo_10"],
        "20_percent": ["demo_3", "demo_7"],
    }
    return write_file(path, add, masks=masks, version=version)


def write_mg(path: Path) -> Path:
    """Machine generated: fixed length, some successes that go on, no masks."""

    def add(data: h5py.Group) -> None:
        for number, success in enumerate([None, 4, None, 14]):
            add_demo(data, number, num_steps=15, first_success=success)

    return write_file(path, add)


def stored_observations(demo: h5py.Group, group: str, keys: tuple[str, ...]) -> np.ndarray:
    return np.hstack([demo[group][key][:] for key in keys]).astype(np.float32)

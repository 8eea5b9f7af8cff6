"""A robomimic file of the toy task, and what a run leaves, ready to be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from toy_task import homing_policy, roll_out

from vla_trqam.envs.robomimic.env_meta import env_meta_for

NUM_DEMOS, CHUNK_LENGTH, MAX_STEPS = 8, 2, 12
TIMES = ("time", "updates_per_s")


def write_toy_file(path: Path, change: Callable[[h5py.File], None] | None = None) -> Path:
    """Eight demos of which most succeed; "worse" are the first four. `change` spoils the file."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_meta_for("Lift"))
        for number in range(NUM_DEMOS):
            _add_demo(data.create_group(f"demo_{number}"), number)
        file["mask/worse"] = np.array([f"demo_{i}" for i in range(4)], dtype="S")
        if change is not None:
            change(file)
    return path


def _add_demo(demo: h5py.Group, number: int) -> None:
    episode = roll_out(homing_policy(CHUNK_LENGTH, noise=0.2), number, MAX_STEPS)
    demo.attrs["num_samples"] = len(episode.actions)
    demo["actions"], demo["rewards"] = episode.actions, episode.rewards
    demo["obs/object"], demo["next_obs/object"] = (
        episode.observations[:-1],
        episode.observations[1:],
    )


def metrics_lines(output_dir: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def checkpoint_state(output_dir: Path) -> dict[str, Any]:
    """The last checkpoint, the log and the evaluation: what equal runs of any recipe agree on."""
    last = output_dir / "checkpoints" / "last"
    saved = [path for path in sorted(last.rglob("*")) if path.is_file()]
    state: dict[str, Any] = {
        str(path.relative_to(last)): path.read_bytes()
        for path in saved
        # The one holds the wall clock, the other its checksum.
        if path.name not in ("position.json", "manifest.json")
    }
    state["checkpoint"] = last.resolve().name
    state["metrics"] = metrics_lines(output_dir)
    evaluation = output_dir / "evaluation.json"
    if evaluation.exists():
        state["evaluation"] = json.loads(evaluation.read_text())
    return state


def final_state(output_dir: Path) -> dict[str, Any]:
    """Everything that two equal runs must agree on to the bit."""
    state = checkpoint_state(output_dir)
    state["base"] = (output_dir / "base_policy" / "model.safetensors").read_bytes()
    header = json.loads((output_dir / "replay" / "replay.json").read_text())
    state["replay"] = header
    for name in ("observations", "actions", "rewards", "episodes"):
        state[name] = np.load(output_dir / "replay" / f"{name}.npy", allow_pickle=False).tobytes()
    return state


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs: short to read where the bytes would not be."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))

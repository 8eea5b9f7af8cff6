"""Checkpoints of a tiny random policy, changed in one place as people bring them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot_contract import checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy

Statistics = dict[str, Tensor]


def copied(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint(kind), folder / kind))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_statistics(folder: Path, change: Callable[[Statistics], Any]) -> None:
    """Those of both processors."""
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        statistics = load_file(path)
        change(statistics)
        save_file(statistics, path)


def without_spread(statistics: Statistics, key: str, dim: int) -> None:
    """As a dataset's are in which this dimension stood at its mean."""
    for name in ("min", "max", "q01", "q99", "q10", "q90"):
        if f"{key}.{name}" in statistics:
            statistics[f"{key}.{name}"][dim] = statistics[f"{key}.mean"][dim]
    statistics[f"{key}.std"][dim] = 0.0


def with_mode(folder: Path, mode: str) -> None:
    """State and action normalised in this mode."""

    def change(fields: dict[str, Any]) -> None:
        for step in fields["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"] |= {"STATE": mode, "ACTION": mode}

    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit_json(folder / name, change)


def told(folder: Path, **settings: Any) -> tuple[LeRobotFlowPolicy, str]:
    """The policy, and what was said while it was loaded."""
    notes: list[str] = []
    policy = load_policy(folder, say=notes.append, **settings)
    return policy, "\n".join(notes)

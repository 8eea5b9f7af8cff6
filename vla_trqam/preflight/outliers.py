"""Single numbers of a dataset that cannot be true: looked for in all rows, before any decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vla_trqam.data.frames import STATE_KEY
from vla_trqam.data.outliers import outliers
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
    from vla_trqam.data.sources.lerobot.rows import RowNumbers
    from vla_trqam.data.sources.lerobot.source import LeRobotReader

NAMED = 3
"""So many outliers are named, the rest counted."""


def check_outliers(policy: LeRobotFlowPolicy, reader: LeRobotReader) -> Finding:
    """No state or action of the dataset is far from the policy's range and all other data."""
    rows = reader.row_numbers()
    relative = getattr(policy.host.config, "use_relative_actions", False)
    said: list[str] = []
    for key, numbers in ((STATE_KEY, rows.states), ("action", rows.actions)):
        # Statistics of relative actions say nothing about the absolute ones in the data.
        scale = None if relative and key == "action" else policy_scale(policy, key)
        said += _outliers(key, numbers, scale, rows)
    if not said:
        return Finding("outliers", f"none in {len(rows.states)} rows")
    more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return Finding.failure(
        "outliers",
        "; ".join(said[:NAMED]) + more,
        "a --dataset.episodes without these episodes, or data in which they are mended",
    )


def policy_scale(policy: LeRobotFlowPolicy, key: str) -> np.ndarray | None:
    """(d,) what one unit of the policy's normalised numbers is in the data's; None if unknown."""
    if policy.processors is None or key not in policy.processors.statistics:
        return None
    step, entry = policy.processors.normalizer, policy.processors.statistics[key]
    mode = str(step.norm_map[step.features[key].type].value) if key in step.features else ""
    ends = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}
    if mode == "MEAN_STD" and "std" in entry:
        scale = entry["std"]
    elif mode in ends and all(name in entry for name in ends[mode]):
        low, high = ends[mode]
        scale = (entry[high] - entry[low]) / 2
    else:
        return None
    return np.abs(scale.detach().cpu().numpy().astype(np.float64).reshape(-1))


def _outliers(
    key: str, numbers: np.ndarray, scale: np.ndarray | None, rows: RowNumbers
) -> list[str]:
    return [
        f"{key}[{dim}] is {numbers[row, dim]:.4g} in frame {rows.frames[row]} of episode "
        f"{rows.episodes[row]}, where the dataset's median is {middle:.4g}"
        for row, dim, middle in outliers(numbers, scale)
    ]

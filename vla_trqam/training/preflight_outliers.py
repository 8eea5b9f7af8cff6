"""Single numbers of a dataset that cannot be true: looked for in all rows, before any decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vla_trqam.data.frame_replay import STATE_KEY
from vla_trqam.training.preflight_report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
    from vla_trqam.data.lerobot_source import LeRobotReader, RowNumbers

FAR = 100.0
"""A number is an outlier this many scales from the median of its dimension.

The scale is the larger one of the policy's (a standard deviation, or half the range) and the data's
own spread. Honest rollouts lie within tens of the policy's; data in other units lies far in those
alone, and is for the judgement of the statistics; a cell overwritten is far in both.
"""
ENDS = 0.05
"""The share of the rows at either end that the data's own spread leaves out."""
STILL = 1e-4
"""A dimension with a smaller scale in the policy's statistics did not move there.

What moves seldom in the data may have no spread either, as a gripper that closes once: there the
scale is at least 1, so that only what no radian, metre or fraction reaches is an outlier.
"""
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


def outlier_limits(numbers: np.ndarray, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The median of each dimension, and how far from it a number may be.

    Args:
        numbers: (N, d), in the data's units.
        scale: (d,) of the policy; None, or another length, judges by the data alone.
    """
    ordered = np.sort(numbers.astype(np.float64), axis=0)  # NaN last
    count = len(ordered)
    left_out = min(-int(-ENDS * count // 1), (count - 1) // 2)
    middle, own = ordered[count // 2], ordered[count - 1 - left_out] - ordered[left_out]
    known = scale is not None and scale.shape == middle.shape
    given = scale if known and scale is not None else np.zeros_like(middle)
    still = np.where(given < STILL, np.maximum(1.0, np.abs(middle)), 0.0)
    return middle, FAR * np.maximum(np.maximum(given, own), still)


def _outliers(
    key: str, numbers: np.ndarray, scale: np.ndarray | None, rows: RowNumbers
) -> list[str]:
    middle, limits = outlier_limits(numbers, scale)
    far = ~(np.abs(numbers - middle) <= limits)  # so that NaN is far
    return [
        f"{key}[{dim}] is {numbers[row, dim]:.4g} in frame {rows.frames[row]} of episode "
        f"{rows.episodes[row]}, where the dataset's median is {middle[dim]:.4g}"
        for row, dim in np.argwhere(far).tolist()
    ]

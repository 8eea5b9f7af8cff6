"""Single numbers that cannot be true: a cell overwritten, a sensor that failed."""

from __future__ import annotations

import numpy as np

FAR = 100.0
"""A number is an outlier this many scales from the median of its dimension.

The scale is the larger one of the policy's (a standard deviation, or half the range), where one is
known, and the data's own spread. Honest rollouts lie within tens of the policy's; data in other
units lies far in those alone, and is for the judgement of the statistics; a cell overwritten is far
in both.
"""
ENDS = 0.05
"""The share of the rows at either end that the data's own spread leaves out."""
STILL = 1e-4
"""A dimension with a smaller scale in the policy's statistics did not move there.

What moves seldom in the data may have no spread either, as a gripper that closes once: there the
scale is at least 1, so that only what no radian, metre or fraction reaches is an outlier.
"""


def outliers(numbers: np.ndarray, scale: np.ndarray | None) -> list[tuple[int, int, float]]:
    """Row, dimension and the dimension's median of every outlier; arguments as `outlier_limits`."""
    middle, limits = outlier_limits(numbers, scale)
    far = ~(np.abs(numbers - middle) <= limits)  # so that NaN is far
    return [(row, dim, float(middle[dim])) for row, dim in np.argwhere(far).tolist()]


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

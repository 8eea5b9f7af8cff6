"""Who holds the controls: six operators of three qualities, as in robomimic's multi-human files.

An operator has habits (a route, a top speed, how steady the hand is); every episode draws its own
numbers around them, so that two episodes of one operator differ a little and two operators a lot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from vla_trqam.errors import UserError

Quality = Literal["better", "okay", "worse"]
Route = Literal["direct", "high", "left", "right"]


@dataclass(frozen=True)
class Operator:
    """The numbers of one operator in one episode.

    Attributes:
        name: such as ``better_operator_1``.
        quality: ``better``, ``okay`` or ``worse``.
        route: the way to the object: straight, from high above, or round by the left or right.
        speed: largest norm of the translation part of an action, in (0, 1].
        gain: share of the remaining position error that an action asks for.
        noise: standard deviation of the action noise (action units).
        noise_correlation: correlation of the noise from one step to the next.
        pause_rate: chance per step that the hand rests.
        pause_steps: length of a rest, in control steps.
        grasp_offset: x, y, z in metres between where the operator grasps and the right place.
        miss_rate: chance that an attempt to grasp is aimed beside the object.
    """

    name: str
    quality: Quality
    route: Route
    speed: float
    gain: float
    noise: float
    noise_correlation: float
    pause_rate: float
    pause_steps: int
    grasp_offset: tuple[float, float, float]
    miss_rate: float


@dataclass(frozen=True)
class _Habits:
    """What an operator's episodes are drawn from; ranges are (low, high)."""

    quality: Quality
    route: Route
    speed: tuple[float, float]
    noise: float
    pause_rate: float
    pause_steps: tuple[int, int]
    offset_std: float
    miss_rate: float


_HABITS: Mapping[str, _Habits] = MappingProxyType(
    {
        "better_operator_1": _Habits(
            "better", "direct", (0.95, 1.0), 0.02, 0.0, (0, 0), 0.001, 0.0
        ),
        "better_operator_2": _Habits("better", "high", (0.85, 0.95), 0.02, 0.0, (0, 0), 0.001, 0.0),
        "okay_operator_1": _Habits("okay", "left", (0.65, 0.85), 0.1, 0.01, (3, 6), 0.005, 0.3),
        "okay_operator_2": _Habits("okay", "right", (0.65, 0.85), 0.1, 0.01, (3, 6), 0.005, 0.3),
        "worse_operator_1": _Habits("worse", "direct", (0.4, 0.6), 0.2, 0.03, (5, 10), 0.008, 0.7),
        "worse_operator_2": _Habits("worse", "high", (0.4, 0.6), 0.2, 0.03, (5, 10), 0.008, 0.7),
    }
)

OPERATOR_NAMES: tuple[str, ...] = tuple(_HABITS)


def operator_names(selection: str) -> tuple[str, ...]:
    """Operators that a selection stands for.

    Args:
        selection: ``mixed`` (all six), a quality (its two) or one operator's name.

    Raises:
        UserError: the selection is none of these.
    """
    if selection == "mixed":
        return OPERATOR_NAMES
    names = tuple(n for n, h in _HABITS.items() if selection in (n, h.quality))
    if not names:
        allowed = ", ".join(("mixed", "better", "okay", "worse", *OPERATOR_NAMES))
        raise UserError(f"operators: {selection!r} is not known; choose one of {allowed}.")
    return names


def draw_operator(name: str, rng: np.random.Generator) -> Operator:
    """Draw one episode's operator around the habits of `name`."""
    habits = _HABITS[name]
    offset = np.clip(rng.normal(0.0, habits.offset_std, 3), -0.015, 0.015)
    return Operator(
        name=name,
        quality=habits.quality,
        route=habits.route,
        speed=float(rng.uniform(*habits.speed)),
        gain=float(rng.uniform(0.9, 1.1)),
        noise=habits.noise,
        noise_correlation=0.7,
        pause_rate=habits.pause_rate,
        pause_steps=int(rng.integers(habits.pause_steps[0], habits.pause_steps[1] + 1)),
        grasp_offset=(float(offset[0]), float(offset[1]), float(offset[2])),
        miss_rate=habits.miss_rate,
    )

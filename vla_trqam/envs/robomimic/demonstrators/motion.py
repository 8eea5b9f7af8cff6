"""From a pose to reach to an action of the OSC_POSE delta controller.

Quaternions are (x, y, z, w), as robosuite's observations carry them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

METRES_PER_ACTION = 0.05
RADIANS_PER_ACTION = 0.5
_EEF_POS, _EEF_QUAT, _FINGERS = slice(0, 3), slice(3, 7), slice(7, 9)
# Lift's "object" starts with the object's pose; Can's and Square's put the pose relative to the
# gripper (7 numbers) first.
_OBJECT_POSE = {19: slice(9, 16), 23: slice(16, 23)}


@dataclass(frozen=True)
class Reading:
    """One low-dimensional observation, taken apart.

    Attributes:
        eef_pos: (3,) gripper site, metres, world frame.
        eef_quat: (4,) of the hand's body; (1, 0, 0, 0) points straight down.
        gap: metres between the fingers, 0 to 0.08.
        object_pos: (3,) metres, world frame.
        object_yaw: radians, rotation about the vertical.
    """

    eef_pos: Array
    eef_quat: Array
    gap: float
    object_pos: Array
    object_yaw: float


def read(observation: NDArray[np.floating]) -> Reading:
    """Take apart the concatenated low-dimensional observation, (19,) for Lift, (23,) otherwise."""
    numbers: Array = np.asarray(observation, dtype=np.float64)
    pose = numbers[_OBJECT_POSE[numbers.shape[0]]]
    fingers = numbers[_FINGERS]
    return Reading(
        eef_pos=numbers[_EEF_POS],
        eef_quat=numbers[_EEF_QUAT],
        gap=float(fingers[0] - fingers[1]),
        object_pos=pose[:3],
        object_yaw=yaw_of(pose[3:]),
    )


def yaw_of(quat: Array) -> float:
    """Rotation about the vertical of a body that stands upright, in radians."""
    x, y, z, w = quat
    return float(np.arctan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z)))


def hand_yaw_of(quat: Array) -> float:
    """Turn of a hand that points down from its home pose, in radians: `downward_quat` undone."""
    x, y, _, _ = quat
    return float(nearest_turn(2.0 * np.arctan2(y, x), 2.0 * np.pi))


def turned(vector: Array, angle: float) -> Array:
    """The vector (3,) turned about the vertical by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1], vector[2]])


def nearest_turn(angle: float, period: float, around: float = 0.0) -> float:
    """The angle equal to `angle` modulo `period` that lies nearest to `around`."""
    return float(angle - period * np.round((angle - around) / period))


def downward_quat(yaw: float) -> Array:
    """Hand pointing straight down, turned by `yaw` about the vertical from its home pose."""
    return np.array([np.cos(yaw / 2), np.sin(yaw / 2), 0.0, 0.0])


def rotation_between(current: Array, target: Array) -> Array:
    """Axis-angle vector (3,), world frame, that turns `current` into `target` the short way."""
    vec_c, vec_t = current[:3], target[:3]
    scalar = float(current[3] * target[3] + vec_c @ vec_t)
    vector = current[3] * vec_t - target[3] * vec_c + np.cross(vec_c, vec_t)
    if scalar < 0.0:  # q and -q are the same rotation: take the one of less than half a turn
        scalar, vector = -scalar, -vector
    norm = float(np.linalg.norm(vector))
    if norm < 1e-9:
        return np.zeros(3)
    return vector / norm * 2.0 * np.arctan2(norm, scalar)


def shorten(vector: Array, limit: float) -> Array:
    """The vector, scaled down to `limit` where it is longer."""
    norm = float(np.linalg.norm(vector))
    return vector if norm <= limit else vector * (limit / norm)

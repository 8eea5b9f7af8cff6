import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_trqam.envs.robomimic.demonstrators.motion import (
    downward_quat,
    hand_yaw_of,
    nearest_turn,
    read,
    rotation_between,
    shorten,
    turned,
    yaw_of,
)


def test_rotation_between_agrees_with_scipy_whichever_sign_the_quaternions_have() -> None:
    rotations = Rotation.random(20, random_state=0)
    for current, target in zip(rotations[:10], rotations[10:], strict=True):
        expected = (target * current.inv()).as_rotvec()
        for sign in (1.0, -1.0):
            found = rotation_between(sign * current.as_quat(), target.as_quat())
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rotation_between_equal_orientations_is_zero() -> None:
    quat = downward_quat(0.3)
    np.testing.assert_array_equal(rotation_between(quat, -quat), np.zeros(3))


@pytest.mark.parametrize("yaw", [-3.0, -1.2, 0.0, 0.4, 3.0])
def test_downward_hand_is_the_home_pose_turned_about_the_vertical(yaw: float) -> None:
    expected = Rotation.from_rotvec([0.0, 0.0, yaw]) * Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
    quat = downward_quat(yaw)
    assert (Rotation.from_quat(quat).inv() * expected).magnitude() < 1e-12
    assert hand_yaw_of(quat) == pytest.approx(yaw)
    assert hand_yaw_of(-quat) == pytest.approx(yaw)


def test_yaw_and_turned_agree_with_scipy() -> None:
    rotation = Rotation.from_rotvec([0.0, 0.0, 0.7])
    assert yaw_of(rotation.as_quat()) == pytest.approx(0.7)
    vector = np.array([0.3, -0.2, 0.5])
    np.testing.assert_allclose(turned(vector, 0.7), rotation.apply(vector))


@pytest.mark.parametrize(
    ("angle", "expected"), [(0.9 * np.pi, -0.1 * np.pi), (0.4 * np.pi, 0.4 * np.pi)]
)
def test_nearest_turn_uses_the_symmetry(angle: float, expected: float) -> None:
    assert nearest_turn(angle, np.pi) == pytest.approx(expected)


def test_shorten_keeps_direction_and_leaves_short_vectors_alone() -> None:
    np.testing.assert_allclose(shorten(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    np.testing.assert_array_equal(shorten(np.array([0.3, 0.4]), 1.0), [0.3, 0.4])


@pytest.mark.parametrize(("width", "object_at"), [(19, 9), (23, 16)])
def test_read_takes_each_number_from_its_place(width: int, object_at: int) -> None:
    observation = np.arange(width, dtype=np.float32)
    reading = read(observation)
    np.testing.assert_array_equal(reading.eef_pos, [0, 1, 2])
    np.testing.assert_array_equal(reading.eef_quat, [3, 4, 5, 6])
    assert reading.gap == -1.0
    np.testing.assert_array_equal(reading.object_pos, object_at + np.arange(3))

"""What the demonstrators of all tasks share: the hand that follows a target, shakes and rests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_trqam.envs.robomimic.demonstrators.motion import (
    METRES_PER_ACTION,
    RADIANS_PER_ACTION,
    Array,
    Reading,
    downward_quat,
    read,
    rotation_between,
    shorten,
)
from vla_trqam.envs.robomimic.demonstrators.operators import Operator

OPEN, CLOSED = -1.0, 1.0
_TURN_SPEED = 0.7  # turning faster than this drags the hand's position off its line
_TURN_NOISE = 0.3  # a hand shakes less in turning than in moving


@dataclass(frozen=True)
class Target:
    """Where the hand should go now.

    Attributes:
        position: (3,) metres, world frame.
        gripper: OPEN or CLOSED.
        yaw: radians from the home orientation.
        slow: factor on the operator's speed, for delicate moves.
    """

    position: Array
    gripper: float
    yaw: float = 0.0
    slow: float = 1.0


class Demonstrator(ABC):
    """A scripted operator: observation in, action out; it touches nothing in the simulator.

    A task's subclass says where to go (`target`); this class moves there with the operator's speed,
    gain, noise and rests. All randomness comes from `rng`.
    """

    def __init__(self, operator: Operator, rng: np.random.Generator) -> None:
        self.operator = operator
        self.rng = rng
        self._noise = np.zeros(6)
        self._rest_steps = 0
        self._gripper = OPEN

    @abstractmethod
    def target(self, reading: Reading) -> Target:
        """Where the hand should go, given what is seen; advances the task's phases."""

    def act(self, observation: NDArray[np.floating]) -> NDArray[np.float32]:
        """The action (7,) in [-1, 1] for the concatenated low-dimensional observation."""
        reading = read(observation)
        motion = np.zeros(6) if self._resting() else self._pursue(reading, self.target(reading))
        motion = np.clip(motion + self._shake(), -1.0, 1.0)
        return np.append(motion, self._gripper).astype(np.float32)

    def _pursue(self, reading: Reading, target: Target) -> Array:
        self._gripper = target.gripper
        gain, speed = self.operator.gain, self.operator.speed * target.slow
        move = gain * (target.position - reading.eef_pos) / METRES_PER_ACTION
        turn = rotation_between(reading.eef_quat, downward_quat(target.yaw)) / RADIANS_PER_ACTION
        return np.concatenate([shorten(move, speed), shorten(turn, _TURN_SPEED)])

    def _resting(self) -> bool:
        # Drawn at every step, resting or not, so that a rest does not shift the noise that follows.
        starts = self.rng.random() < self.operator.pause_rate
        if self._rest_steps > 0:
            self._rest_steps -= 1
            return True
        if starts:
            self._rest_steps = self.operator.pause_steps
        return False

    def _shake(self) -> Array:
        rho = self.operator.noise_correlation
        fresh = self.rng.normal(0.0, self.operator.noise, 6) * np.sqrt(1.0 - rho**2)
        self._noise = rho * self._noise + fresh
        return self._noise * np.array([1.0, 1.0, 1.0, _TURN_NOISE, _TURN_NOISE, _TURN_NOISE])

"""Reaching, closing and noticing a miss: the part that Lift, Can and Square have in common."""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum, auto

import numpy as np

from vla_trqam.envs.robomimic.demonstrators.base import CLOSED, OPEN, Demonstrator, Target
from vla_trqam.envs.robomimic.demonstrators.motion import Array, Reading, hand_yaw_of, nearest_turn
from vla_trqam.envs.robomimic.demonstrators.operators import Operator

_SIDE_STEP = 0.10  # metres that the left and right routes swing out
_HIGH_ROUTE = 0.08  # metres that the high route keeps above the hover height
_ARRIVED = 0.02  # metres from a waypoint at which the next one counts
_ALIGNED = 0.012  # horizontal error below which the hand may go all the way down
_SQUARE_ON = 0.15  # turn error in radians that does no harm
_METRES_PER_TURN = 0.06  # horizontal error as bad as a radian of turn error, metres
_FUNNEL_SLOPE = 4.0  # metres of height kept per metre of horizontal error
_STILL = 4e-4  # metres per step: fingers slower than this have closed on something
_OPEN_GAP = 0.074  # metres: wider than this, the fingers have yet to start closing
_TOUCH = 0.008  # metres above the grasp at which closing starts


class Phase(Enum):
    """What the hand is doing."""

    ROUTE = auto()
    REACH = auto()
    CLOSE = auto()
    CARRY = auto()
    RELEASE = auto()
    RECOVER = auto()


class GraspingDemonstrator(Demonstrator):
    """Reach down a funnel over the object, close, look whether it holds, carry; retry on a miss.

    The funnel makes the reach one continuous function of the state: the hand comes down only as
    far as it is aligned, so a policy can imitate it without knowing the phase.
    """

    hover = 0.08  # metres above the grasp at which the hand may be off to the side
    held_gap = (0.01, 0.078)  # fingers that hold the object are this far apart, metres

    def __init__(self, operator: Operator, rng: np.random.Generator) -> None:
        super().__init__(operator, rng)
        self.phase = Phase.ROUTE
        self._waypoint: Array | None = None
        self._aim_error: Array = np.zeros(3)
        self._last_gap = 0.0
        self._hold_at: tuple[Array, float] | None = None
        self._aim()

    @abstractmethod
    def grasp_pose(self, reading: Reading) -> tuple[Array, float]:
        """Right place (3,) and yaw of the hand to grasp the object where it is now."""

    @abstractmethod
    def carry(self, reading: Reading) -> Target:
        """Where to take the object once it is held (phases CARRY and RELEASE)."""

    def target(self, reading: Reading) -> Target:
        """Follow the phases; see the class."""
        if self.phase is Phase.ROUTE:
            return self._route(reading)
        if self.phase is Phase.REACH:
            return self._reach(reading)
        if self.phase is Phase.CLOSE:
            return self._close(reading)
        if self.phase is Phase.RECOVER:
            return self._recover(reading)
        if self.phase is Phase.CARRY and self.lost(reading):
            return self._start_recovery(reading)
        return self.carry(reading)

    def lost(self, reading: Reading) -> bool:
        """Whether the fingers hold nothing."""
        return not self.held_gap[0] < reading.gap < self.held_gap[1]

    def _aim(self) -> None:
        """Draw this attempt's error: the operator's offset, or a miss that closes on air."""
        self._aim_error = np.array(self.operator.grasp_offset)
        if self.rng.random() < self.operator.miss_rate:
            self._aim_error = self._aim_error + self.miss()

    def miss(self) -> Array:
        """Error (3,) of an attempt that closes on air: above the object or to one side of it."""
        distance, above = self.rng.uniform(0.04, 0.05), self.rng.random() < 0.5
        side = self.rng.choice((-1.0, 1.0))
        # To the side the fingers are thin: closing there does not pinch the object's edge.
        return np.array([0.0, 0.0, distance]) if above else np.array([side * distance, 0.0, 0.0])

    def _place(self, reading: Reading) -> tuple[Array, float]:
        position, yaw = self.grasp_pose(reading)
        return position + self._aim_error, yaw

    def _route(self, reading: Reading) -> Target:
        place, yaw = self._place(reading)
        if self.operator.route == "direct":
            self.phase = Phase.REACH
            return self._reach(reading)
        if self._waypoint is None:
            self._waypoint = self._first_waypoint(reading, place)
        if np.linalg.norm(self._waypoint - reading.eef_pos) < _ARRIVED:
            self.phase = Phase.REACH
            return self._reach(reading)
        return Target(self._waypoint, OPEN, yaw)

    def _first_waypoint(self, reading: Reading, place: Array) -> Array:
        above = place + np.array([0.0, 0.0, self.hover])
        if self.operator.route == "high":
            return above + np.array([0.0, 0.0, _HIGH_ROUTE])
        side = _SIDE_STEP if self.operator.route == "left" else -_SIDE_STEP
        middle = 0.5 * (reading.eef_pos + above)
        return middle + np.array([0.0, side, 0.0])

    def _reach(self, reading: Reading) -> Target:
        place, yaw = self._place(reading)
        askew = abs(nearest_turn(yaw - hand_yaw_of(reading.eef_quat), 2.0 * np.pi))
        error = float(np.linalg.norm((place - reading.eef_pos)[:2]))
        error += _METRES_PER_TURN * max(0.0, askew - _SQUARE_ON)
        height = min(self.hover, _FUNNEL_SLOPE * max(0.0, error - _ALIGNED))
        if error < _ALIGNED and reading.eef_pos[2] - place[2] < _TOUCH:
            return self._start_closing(reading, place, yaw)
        return Target(place + np.array([0.0, 0.0, height]), OPEN, yaw)

    def _start_closing(self, reading: Reading, place: Array, yaw: float) -> Target:
        self.phase = Phase.CLOSE
        self._hold_at = place, yaw  # following the object while closing would drag it along
        self._last_gap = reading.gap
        return Target(place, CLOSED, yaw)

    def _close(self, reading: Reading) -> Target:
        still = abs(self._last_gap - reading.gap) < _STILL
        self._last_gap = reading.gap
        if still and reading.gap < _OPEN_GAP:
            if self.lost(reading):
                return self._start_recovery(reading)
            self.phase = Phase.CARRY
            return self.carry(reading)
        assert self._hold_at is not None
        place, yaw = self._hold_at
        return Target(place, CLOSED, yaw)

    def _start_recovery(self, reading: Reading) -> Target:
        self.phase = Phase.RECOVER
        self._aim()
        return self._recover(reading)

    def _recover(self, reading: Reading) -> Target:
        """Open and rise over the object, then reach again."""
        place, yaw = self._place(reading)
        above = np.array([reading.eef_pos[0], reading.eef_pos[1], place[2] + self.hover])
        if reading.eef_pos[2] > above[2] - _ARRIVED and reading.gap > 0.07:
            self.phase = Phase.REACH
            return self._reach(reading)
        return Target(above, OPEN, yaw)

"""Square (NutAssemblySquare): put the square nut over the square peg."""

from __future__ import annotations

import numpy as np

from vla_trqam.envs.robomimic.demonstrators.base import CLOSED, OPEN, Target
from vla_trqam.envs.robomimic.demonstrators.grasping import GraspingDemonstrator, Phase
from vla_trqam.envs.robomimic.demonstrators.motion import (
    Array,
    Reading,
    hand_yaw_of,
    nearest_turn,
    turned,
)

_PEG = np.array([0.23, 0.10])
_HANDLE = 0.054  # metres from the nut's centre to the middle of its handle, along the nut's x
_GRASP_HEIGHT = 0.003  # metres above the nut's centre: the finger tips stay off the table
_ABOVE_PEG = 0.985  # height of the nut that clears the peg's top at 0.95
_SEATED = 0.845  # height of the nut that counts as success, with a margin (success is 0.87)
_LET_GO = 0.865  # height of the nut below which it stays on the peg by itself
_LEVEL = 0.005  # horizontal error of the nut at which it may go down: the play is 0.007 each side
_SQUARE_ON = 0.10  # turn error of the nut at which it may go down, radians
_CARRY_SPEED = 0.8
# Metres that the hand aims below itself: going down faster, the arm drifts outwards by more than
# the nut's play and wedges it on the peg's edge.
_LOWERING = 0.02
_SEAT_YAWS = (0.5 * np.pi, np.pi, -0.5 * np.pi)  # of the nut on the peg, radians


class SquareDemonstrator(GraspingDemonstrator):
    """Grasp the handle, raise, turn square to the peg on the way, lower, let go."""

    hover = 0.08
    _goal_yaw: float | None = None

    def grasp_pose(self, reading: Reading) -> tuple[Array, float]:
        """The handle's middle; the fingers close across it, so the hand turns as the nut does."""
        arm = turned(np.array([_HANDLE, 0.0, _GRASP_HEIGHT]), reading.object_yaw)
        self._goal_yaw = None  # the turn at the peg depends on the grasp to come
        return reading.object_pos + arm, nearest_turn(reading.object_yaw, np.pi)

    def lost(self, reading: Reading) -> bool:
        """Nothing between the fingers, or the nut left behind."""
        away = float(np.linalg.norm(reading.object_pos - reading.eef_pos))
        return super().lost(reading) or away > 2.5 * _HANDLE

    def carry(self, reading: Reading) -> Target:
        """Raise, bring the nut over the peg while turning it, lower it, let go."""
        if self._goal_yaw is None:
            self._goal_yaw = self._choose_yaw(reading)
        if self.phase is Phase.RELEASE or self._seated(reading):
            self.phase = Phase.RELEASE
            return Target(reading.eef_pos + np.array([0.0, 0.0, 0.1]), OPEN, self._goal_yaw)
        turn = nearest_turn(self._goal_yaw - hand_yaw_of(reading.eef_quat), 2 * np.pi)
        reach = turned(reading.object_pos - reading.eef_pos, turn)
        error = self._error(reading)
        seat = np.array([*_PEG, self._height(error, reading)]) - reach
        seat[2] = max(seat[2], reading.eef_pos[2] - _LOWERING)
        # Low down only climb, or the nut is dragged over the table and into the peg's side.
        across = 1.0
        if error > 0.03:
            across = float(np.interp(reading.object_pos[2], (0.90, 0.95), (0.0, 1.0)))
        place = reading.eef_pos[:2] + across * (seat[:2] - reading.eef_pos[:2])
        return Target(np.array([*place, seat[2]]), CLOSED, self._goal_yaw, _CARRY_SPEED)

    def _choose_yaw(self, reading: Reading) -> float:
        """The hand's turn that brings the nut square to the peg soonest, its handle near enough.

        A handle that points away from the robot would put the hand out of the arm's reach.
        """
        turns = [nearest_turn(yaw - reading.object_yaw, 2 * np.pi) for yaw in _SEAT_YAWS]
        return hand_yaw_of(reading.eef_quat) + min(turns, key=abs)

    def _error(self, reading: Reading) -> float:
        return float(np.linalg.norm(reading.object_pos[:2] - _PEG))

    def _height(self, error: float, reading: Reading) -> float:
        askew = abs(nearest_turn(reading.object_yaw, np.pi / 2))
        ready = error < _LEVEL and askew < _SQUARE_ON
        on_peg = reading.object_pos[2] < 0.95 and error < 0.012
        return _SEATED if ready or on_peg else _ABOVE_PEG

    def _seated(self, reading: Reading) -> bool:
        return bool(reading.object_pos[2] < _LET_GO and self._error(reading) < 0.02)

"""Can (PickPlaceCan): carry the can over to the far bin's far corner and let go."""

from __future__ import annotations

import numpy as np

from vla_trqam.envs.robomimic.demonstrators.base import CLOSED, OPEN, Target
from vla_trqam.envs.robomimic.demonstrators.grasping import GraspingDemonstrator, Phase
from vla_trqam.envs.robomimic.demonstrators.motion import Array, Reading

# Well inside the can's quarter of the second bin, and on its near side: the quarter's centre is at
# the end of the arm's reach, where the hand no longer follows.
_GOAL = np.array([0.15, 0.335])
_CLEAR = 0.98  # height of the hand that takes the can over the wall between the bins
_OVER_GOAL = 0.025  # horizontal error at which the can may fall
_GRASP_HEIGHT = 0.015  # metres above the can's centre: the fingers stay clear of the floor
_RISE = (
    0.92,
    0.97,
)  # the hand moves across from the first of these heights on, fully at the second


class CanDemonstrator(GraspingDemonstrator):
    """Grasp from above (a can needs no turning), over the wall, down, let go."""

    hover = 0.10

    def grasp_pose(self, reading: Reading) -> tuple[Array, float]:
        """A little above the can's centre, the hand as it stands at home."""
        return reading.object_pos + np.array([0.0, 0.0, _GRASP_HEIGHT]), 0.0

    def carry(self, reading: Reading) -> Target:
        """Up, across on a rounded corner, let go over the goal."""
        if self.phase is Phase.CARRY and np.linalg.norm(_GOAL - reading.eef_pos[:2]) < _OVER_GOAL:
            self.phase = Phase.RELEASE
        if self.phase is Phase.RELEASE:
            return Target(np.array([*_GOAL, _CLEAR]), OPEN)
        # Low down only climb: the can would be dragged along the bin's floor and wall otherwise.
        across = np.interp(reading.eef_pos[2], _RISE, (0.0, 1.0))
        place = reading.eef_pos[:2] + across * (_GOAL - reading.eef_pos[:2])
        return Target(np.array([*place, _CLEAR]), CLOSED)

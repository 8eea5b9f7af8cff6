"""Lift: take the cube off the table."""

from __future__ import annotations

import numpy as np

from vla_trqam.envs.robomimic.demonstrators.base import CLOSED, Target
from vla_trqam.envs.robomimic.demonstrators.grasping import GraspingDemonstrator
from vla_trqam.envs.robomimic.demonstrators.motion import Array, Reading, nearest_turn

_LIFT_HEIGHT = 0.10  # metres above the cube's centre; success is 0.04 above the table


class LiftDemonstrator(GraspingDemonstrator):
    """Grasp the cube across two faces and go straight up."""

    def grasp_pose(self, reading: Reading) -> tuple[Array, float]:
        """The cube's centre, the hand turned to its nearest pair of faces."""
        return reading.object_pos, nearest_turn(reading.object_yaw, np.pi / 2)

    def carry(self, reading: Reading) -> Target:
        """Straight up, holding."""
        _, yaw = self.grasp_pose(reading)
        return Target(reading.eef_pos + np.array([0.0, 0.0, _LIFT_HEIGHT]), CLOSED, yaw)

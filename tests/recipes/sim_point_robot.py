"""The toy's point as a robot that LeRobot drives, and the person who stands beside it.

The person does what one does at a robot: sets it up anew before each episode, ends the episode by
the right arrow when the task is solved or has taken too long, and notes which were solved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot
from toy_images import CAMERA, SIZE, draw
from toy_task import NEAR, STEP, observe, start_of

STATES, ACTIONS = ("x.pos", "y.pos", "far.pos"), ("x.pos", "y.pos")


@RobotConfig.register_subclass("sim_point")
@dataclass(kw_only=True)
class SimPointConfig(RobotConfig):
    """Nothing to set."""


@dataclass
class Person:
    """Beside the robot.

    Attributes:
        max_steps: after which an episode is given up.
        seed: of the first episode; the next ones follow.
        events: the keys that LeRobot's recording looks at.
        solved: of every episode that was recorded.
    """

    max_steps: int
    seed: int
    events: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(
            ("exit_early", "rerecord_episode", "stop_recording"), False
        )
    )
    solved: list[bool] = field(default_factory=list)

    def hears(self, said: str, *_: Any, **__: Any) -> None:
        """LeRobot says what it does."""
        robot = SimPoint.made
        if said.startswith("Recording episode") and robot is not None:
            robot.position, robot.steps = start_of(self.seed + len(self.solved)), 0
            self.solved.append(False)

    def watches(self, robot: SimPoint) -> None:
        """After every action."""
        near = bool(np.linalg.norm(robot.position) < NEAR)
        if self.solved and (near or robot.steps >= self.max_steps):
            self.solved[-1] = near
            self.events["exit_early"] = True


class SimPoint(Robot):
    """A point in the plane, which an action moves.

    Attributes:
        made: the last one that was connected.
        person: beside it.
    """

    config_class, name = SimPointConfig, "sim_point"
    made: ClassVar[SimPoint | None] = None
    person: ClassVar[Person | None] = None

    def __init__(self, config: SimPointConfig) -> None:
        super().__init__(config)
        self.position, self.steps, self._connected = np.zeros(2), 0, False
        type(self).made = self

    @property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(STATES, float) | {CAMERA: (SIZE, SIZE, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        seen = map(float, observe(self.position))
        return dict(zip(STATES, seen, strict=True)) | {CAMERA: draw(self.position)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        moved = np.clip([float(action[name]) for name in ACTIONS], -1.0, 1.0)
        self.position, self.steps = self.position + STEP * moved, self.steps + 1
        if self.person is not None:
            self.person.watches(self)
        return dict(zip(ACTIONS, map(float, moved), strict=True))

    def disconnect(self) -> None:
        self._connected = False

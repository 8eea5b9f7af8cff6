"""The toy's point as a robot that LeRobot drives, and the people who stand beside it.

A person does what one does at a robot: sets it up anew before each episode, ends the episode by
the right arrow when the task is solved or has taken too long, and notes which were solved; or takes
over with a leader arm after a few actions of the policy, and brings the point home.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot
from lerobot.rollout.strategies.dagger import DAggerEvents, DAggerPhase
from lerobot.teleoperators.config import TeleoperatorConfig
from lerobot.teleoperators.teleoperator import Teleoperator
from toy_images import CAMERA, SIZE, draw
from toy_task import NEAR, STEP, observe, start_of

STATES, ACTIONS = ("x.pos", "y.pos", "far.pos"), ("x.pos", "y.pos")


@RobotConfig.register_subclass("sim_point")
@dataclass(kw_only=True)
class SimPointConfig(RobotConfig):
    """Nothing to set."""


class Beside(Protocol):
    """Whoever stands beside the robot."""

    @property
    def holds(self) -> bool:
        """Whether the robot is to stay where it is."""

    def watches(self, robot: SimPoint) -> None:
        """After every action."""


@dataclass
class Person:
    """Lets the policy play.

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
    holds: bool = False

    def hears(self, said: str, *_: Any, **__: Any) -> None:
        """LeRobot says what it does."""
        robot = SimPoint.made
        if said.startswith("Recording episode") and robot is not None:
            robot.set_up(self.seed + len(self.solved))
            self.solved.append(False)

    def watches(self, robot: SimPoint) -> None:
        """After every action."""
        if self.solved and (robot.is_home or robot.steps >= self.max_steps):
            self.solved[-1] = robot.is_home
            self.events["exit_early"] = True


@dataclass
class Corrector:
    """Takes over after the policy's first actions, until the point is home.

    Attributes:
        alone: actions that the policy takes before.
        seed: of the first start; the next ones follow.
        corrections: that were ended.
        keys: what LeRobot asks the keyboard for.
    """

    alone: int
    seed: int
    corrections: int = 0
    keys: DAggerEvents = field(default_factory=DAggerEvents)

    def listens(self, keys: DAggerEvents, *_: Any) -> None:
        """LeRobot asks for a keyboard; the robot is ready."""
        self.keys = keys
        assert SimPoint.made is not None
        SimPoint.made.set_up(self.seed)

    @property
    def holds(self) -> bool:
        """A robot whose actions are places would stay by itself."""
        return self.keys.phase is DAggerPhase.PAUSED

    def watches(self, robot: SimPoint) -> None:
        """After every action."""
        if self.keys.phase is DAggerPhase.AUTONOMOUS:
            if robot.steps >= self.alone:
                self.keys.request_transition("pause_resume")
        elif self.keys.phase is DAggerPhase.CORRECTING:
            if robot.is_home:
                self.keys.request_transition("correction")
                self.corrections += 1
        elif robot.is_home:
            robot.set_up(self.seed + self.corrections)
            self.keys.request_transition("pause_resume")
        else:
            self.keys.request_transition("correction")


@TeleoperatorConfig.register_subclass("sim_leader")
@dataclass(kw_only=True)
class SimLeaderConfig(TeleoperatorConfig):
    """Nothing to set."""


class SimLeader(Teleoperator):
    """A leader arm in the hand of someone who knows the way."""

    config_class, name = SimLeaderConfig, "sim_leader"
    feedback_features: ClassVar[dict[str, Any]] = {}
    is_connected = is_calibrated = True

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(ACTIONS, float)

    def get_action(self) -> dict[str, Any]:
        assert SimPoint.made is not None
        wanted = np.clip(-SimPoint.made.position / STEP, -1.0, 1.0)
        return dict(zip(ACTIONS, map(float, wanted), strict=True))

    def connect(self, calibrate: bool = True) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def send_feedback(self, feedback: dict[str, Any]) -> None: ...
    def disconnect(self) -> None: ...


class SimPoint(Robot):
    """A point in the plane, which an action moves.

    Attributes:
        made: the last one that was connected.
        person: beside it.
    """

    config_class, name = SimPointConfig, "sim_point"
    made: ClassVar[SimPoint | None] = None
    person: ClassVar[Beside | None] = None

    def __init__(self, config: SimPointConfig) -> None:
        super().__init__(config)
        self.position, self.steps, self._connected = np.zeros(2), 0, False
        type(self).made = self

    def set_up(self, seed: int) -> None:
        """Put where an episode starts."""
        self.position, self.steps = start_of(seed), 0

    @property
    def is_home(self) -> bool:
        """Whether the task is solved."""
        return bool(np.linalg.norm(self.position) < NEAR)

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
        if self.person is None or not self.person.holds:
            self.position, self.steps = self.position + STEP * moved, self.steps + 1
        if self.person is not None:
            self.person.watches(self)
        return dict(zip(ACTIONS, map(float, moved), strict=True))

    def disconnect(self) -> None:
        self._connected = False

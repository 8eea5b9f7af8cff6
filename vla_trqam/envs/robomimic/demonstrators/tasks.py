"""The tasks that have a demonstrator, by the names that robomimic gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vla_trqam.envs.robomimic.demonstrators.base import Demonstrator
from vla_trqam.envs.robomimic.demonstrators.can import CanDemonstrator
from vla_trqam.envs.robomimic.demonstrators.lift import LiftDemonstrator
from vla_trqam.envs.robomimic.demonstrators.square import SquareDemonstrator
from vla_trqam.envs.robomimic.env import Task
from vla_trqam.errors import UserError


@dataclass(frozen=True)
class DemoTask:
    """A task and who demonstrates it.

    Attributes:
        env_name: robosuite's name.
        demonstrator: the state machine.
        max_steps: control steps (1/20 s) after which an episode counts as failed.
    """

    env_name: Task
    demonstrator: type[Demonstrator]
    max_steps: int


DEMO_TASKS: Mapping[str, DemoTask] = MappingProxyType(
    {
        "lift": DemoTask("Lift", LiftDemonstrator, 150),
        "can": DemoTask("PickPlaceCan", CanDemonstrator, 300),
        "square": DemoTask("NutAssemblySquare", SquareDemonstrator, 400),
    }
)


def demo_task(name: str) -> DemoTask:
    """The task called `name`: lift, can or square.

    Raises:
        UserError: there is no such task.
    """
    if name not in DEMO_TASKS:
        raise UserError(
            f"task: {name!r} has no demonstrator; choose one of {', '.join(DEMO_TASKS)}."
        )
    return DEMO_TASKS[name]

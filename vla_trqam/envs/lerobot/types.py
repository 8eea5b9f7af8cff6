"""What LeRobot's code of a type of environment does, and does not say.

A type that is not here starts where its reset's seed says, executes actions within its box, and
renders at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vla_trqam.envs.lerobot.sight import Sight, SightByFormat, SightByType


@dataclass(frozen=True)
class TypeFacts:
    """Of one type.

    Attributes:
        install: this project's own extra; None where there is none.
        text: what a policy is told, of a type that says nothing itself; as LeRobot's datasets of
            it have it.
        sight: keeps it from rendering where nobody looks.
        start: sets an environment (unwrapped) to its k-th initial state, where its reset's seed
            does not.
        nominal_box: whether the box of its actions is a formality: numbers beyond are executed,
            as angles of joints are. Given the type's options.
        note: what who reads its success rates must know.
        refused: why episodes of it cannot be functions of their seeds.
    """

    install: str | None = None
    text: str | None = None
    sight: type[Sight] | None = None
    start: Callable[[Any, int], None] | None = None
    nominal_box: Callable[[Mapping[str, Any]], bool] = lambda _: False
    note: str | None = None
    refused: str | None = None


def _state_of_libero(env: Any, number: int) -> None:
    """It plays its files' initial states one after the other, whatever the seed."""
    env.init_state_id = number


_LIBERO = TypeFacts(
    # Its robosuite is not Robomimic's.
    install="uv sync --no-group simulators --extra libero",
    start=_state_of_libero,
    note="it has a few initial states a task (LIBERO's own suites 50), which training and all "
    "evaluations share, and which repeat where more episodes are played",
    nominal_box=lambda options: options.get("control_mode") == "absolute",
)

_TYPES: dict[str, TypeFacts] = {
    "pusht": TypeFacts(
        install="uv sync --extra pusht",
        text="Push the T-shaped block onto the T-shaped target.",
        sight=SightByType,
    ),
    "metaworld": TypeFacts(install="uv sync --extra metaworld", sight=SightByFormat),
    "libero": _LIBERO,
    "libero_plus": _LIBERO,
    "aloha": TypeFacts(nominal_box=lambda _: True),
    "robotwin": TypeFacts(nominal_box=lambda _: True),
    "vlabench": TypeFacts(nominal_box=lambda _: True),  # angles of the hand, up to pi
    "robomme": TypeFacts(refused="LeRobot's code of it starts the same episode at every seed"),
}


def facts_of(env_type: str) -> TypeFacts:
    """By LeRobot's name of the type."""
    return _TYPES.get(env_type, TypeFacts())

"""The choice of a method, ``--method.type=NAME``, and its knobs.

A choice's knobs are flags of their own, ``--method.<knob>``, which depend on the type. A preset has
the knobs of several methods, in sections ``methods: {trqam: {...}, fql: {...}}``, of which the
chosen one's count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import draccus

from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig
from vla_trqam.methods.registry import METHODS
from vla_trqam.methods.trqam_config import TRQAMConfig

if TYPE_CHECKING:
    MethodChoice = MethodConfig
else:

    class MethodChoice(draccus.ChoiceRegistry):
        """The method, and its knobs."""


if not TYPE_CHECKING:
    for _name, _entry in METHODS.items():
        MethodChoice.register_subclass(_name, _entry.config)

METHOD, TYPE, SECTIONS = "method", "method.type", "methods"
DEFAULT_TYPE = "trqam"
Settings = dict[str, Any]


def knobs_of(name: str) -> dict[str, Any]:
    """Every knob of a method, by its name, and its type.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"--{TYPE}={name} is not known; there are {', '.join(METHODS)}")
    config = METHODS[name].config
    assert dataclasses.is_dataclass(config)
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def with_chosen_type(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> Settings:
    """Settings below flags, both by dotted name and in today's names, of one method.

    Args:
        settings: of a preset or a file, which may have sections of several methods.
        flags: of the command line; they win.

    Raises:
        UserError: a knob is not the method's.
    """
    chosen = str(flags.get(TYPE) or settings.get(TYPE) or DEFAULT_TYPE)
    known = knobs_of(chosen)
    own = f"{SECTIONS}.{chosen}."
    below = {
        f"{METHOD}.{name.removeprefix(own)}" if name.startswith(own) else name: value
        for name, value in settings.items()
        if name.startswith(own) or not name.startswith(f"{SECTIONS}.")
    }
    whole = below | dict(flags) | {TYPE: chosen}
    for name in whole:
        knob = name.removeprefix(f"{METHOD}.")
        if name != TYPE and name.startswith(f"{METHOD}.") and knob not in known:
            _refuse(knob, chosen)
    return whole


def _refuse(knob: str, chosen: str) -> None:
    """Says whose knob it is; of one that is nobody's the caller says what is like it."""
    others = [name for name in METHODS if knob in knobs_of(name)]
    if others:
        takes = " or ".join(f"--{TYPE}={name}" for name in others)
        raise UserError(f"--{METHOD}.{knob} is no knob of {chosen}: add {takes}, or leave it out")


def default_method() -> MethodConfig:
    """What is taken where no setting says otherwise."""
    return TRQAMConfig()

"""The choice of a method, ``--method.type=NAME``, and the names that its knobs had before.

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
from vla_trqam.methods.qam import DUAL_OFF
from vla_trqam.methods.registry import METHODS
from vla_trqam.methods.trqam import FORMER_SCHEME, TRQAMConfig

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
FORMER_NAME, FORMER_GROUP = "method.name", "trqam."
"""What the type and the knobs of TRQAM and QAM were called, when there was no other method."""
FORMER_METHODS = ("trqam", "qam")
FORMER = {"method.scheme": FORMER_SCHEME}
"""What runs did before there was a setting for it, where the default is something else today."""
OF_FORMER = "method.time_shift"
"""A setting that every former run's settings have, and that settings written by hand have not,
unless they mean the former kind."""
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


def of_today(settings: Mapping[str, Any]) -> Settings:
    """The same settings by the names of today.

    ``method.kl_budget`` was the name of what is ``method.kl_budget``, and ``method.name`` of
    ``method.type``.

    Raises:
        UserError: a setting has both names, or the former group's method is another.
    """
    found = {k: v for k, v in settings.items() if not k.startswith(FORMER_GROUP)}
    if FORMER_NAME in found:
        found[TYPE] = found.pop(FORMER_NAME)
    former = {k: v for k, v in settings.items() if k.startswith(FORMER_GROUP)}
    for name, value in former.items():
        now = f"{METHOD}.{name.removeprefix(FORMER_GROUP)}"
        if now in found:
            raise UserError(f"--{name} is the former name of --{now}, and both are given")
        found[now] = value
    return found


def of_former_run(settings: Mapping[str, Any]) -> Settings:
    """:func:`of_today` of a whole file, in which every knob of the former group stands.

    TRQAM's beta stood there, at 1, and QAM's lambda, which was set to 1 whatever stood there.
    """
    if FORMER_NAME not in settings and not any(k.startswith(FORMER_GROUP) for k in settings):
        return dict(settings)
    found = of_today(settings)
    name, beta = found.get(TYPE, DEFAULT_TYPE), f"{METHOD}.inverse_temperature"
    if name == "qam":
        return {k: v for k, v in found.items() if k.removeprefix(f"{METHOD}.") not in DUAL_OFF}
    if found.get(beta, 1.0) == 1.0:
        found.pop(beta, None)
    return found


def former_values(settings: Mapping[str, Any]) -> Settings:
    """What former runs did of that for which these settings have nothing."""
    if settings.get(TYPE, DEFAULT_TYPE) not in FORMER_METHODS:
        return {}
    return {name: value for name, value in FORMER.items() if name not in settings}


def default_method() -> MethodConfig:
    """What is taken where no setting says otherwise."""
    return TRQAMConfig()

"""What settings were called before, and what runs did before there was a setting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla_trqam.config.methods import DEFAULT_TYPE, METHOD, TYPE
from vla_trqam.errors import UserError
from vla_trqam.methods.qam import DUAL_OFF
from vla_trqam.methods.trqam_config import FORMER_SCHEME

Settings = dict[str, Any]
FORMER_NAME, FORMER_GROUP = "method.name", "trqam."
"""What the type and the knobs of TRQAM and QAM were called, when there was no other method."""
RENAMED = {
    "offline.steps": "steps",
    "offline.critic_steps": "critic.warmup_steps",
    "offline.base_episodes": "base_episodes",
    FORMER_NAME: TYPE,
}
"""What runs on states called what they share with the others, and the method's former name."""
FORMER_METHODS = ("trqam", "qam")
FORMER = {"method.scheme": FORMER_SCHEME}
"""What runs did before there was a setting for it, where the default is something else today."""
OF_FORMER = "method.time_shift"
"""A setting that every former run's settings have, and that settings written by hand have not,
unless they mean the former kind."""


def name_today(name: str) -> str:
    """A setting's name of today."""
    if name.startswith(FORMER_GROUP):
        return f"{METHOD}.{name.removeprefix(FORMER_GROUP)}"
    return RENAMED.get(name, name)


def of_today(settings: Mapping[str, Any]) -> Settings:
    """The same settings by the names of today.

    Raises:
        UserError: a setting has both names.
    """
    found: Settings = {}
    for name, value in settings.items():
        now = name_today(name)
        if now != name and now in settings:
            raise UserError(f"--{name} is the former name of --{now}, and both are given")
        found[now] = value
    return found


def of_former_run(settings: Mapping[str, Any]) -> Settings:
    """:func:`of_today` of a whole file, in which every knob of the former group stands.

    TRQAM's beta stood there, at 1, and QAM's lambda, which was set to 1 whatever stood there.
    """
    found = of_today(settings)
    if FORMER_NAME not in settings and not any(k.startswith(FORMER_GROUP) for k in settings):
        return found
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

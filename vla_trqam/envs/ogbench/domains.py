"""The papers' settings per domain of OGBench: what ``domains.yaml`` says of a task."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("domains.yaml")
UNKNOWN = "?"
OF_METHOD = re.compile(r"methods\.(\w+)\.")


@dataclass(frozen=True)
class DomainSetting:
    """A setting of a domain.

    Attributes:
        name: dotted, as a preset has it.
        value: what is to be taken.
        source: where it is from.
        known: whether that says so; otherwise the value is what stands in its place.
    """

    name: str
    value: Any
    source: str
    known: bool


def domain_of(task: str) -> str:
    """``cube-double-play`` of ``cube-double-play-singletask-task2-v0``."""
    return re.sub(r"(-singletask(-task\d)?)?-v0$", "", task)


def settings_of_domain(domain: str, methods: Container[str]) -> list[DomainSetting]:
    """The settings of a domain; none for one that no paper has.

    Args:
        domain: see :func:`domain_of`.
        methods: those that there are; the settings of others are left out.
    """
    table = _table()
    if domain not in table["domains"]:
        return []
    number = table["domains"].index(domain)
    return [
        _setting(name, row, number, table["sources"])
        for row in table["rows"]
        for name in row["set"]
        if (match := OF_METHOD.match(name)) is None or match[1] in methods
    ]


def preset_of_domains() -> str:
    """The preset that the settings are for."""
    return str(_table()["preset"])


def _setting(name: str, row: dict[str, Any], number: int, sources: dict[str, str]) -> DomainSetting:
    value = row["values"][number]
    known = value != UNKNOWN
    return DomainSetting(name, value if known else row["unknown"], sources[row["source"]], known)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text("utf-8"))
    return table

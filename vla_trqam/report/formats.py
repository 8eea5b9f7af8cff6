"""Tables and numbers as Markdown and JSON want them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_trqam.report.evaluation import Interval
from vla_trqam.report.metrics import json_number


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(rate: float) -> str:
    """0.5 -> 50.0%."""
    return f"{100 * rate:.1f}%"


def points(difference: float) -> str:
    """0.05 -> +5.0."""
    return f"{100 * difference:+.1f}"


def points_interval(interval: Interval) -> str:
    """Both ends in percentage points; none of NaN."""
    if math.isnan(interval.low):
        return "none"
    return f"{points(interval.low)} to {points(interval.high)}"


def jsonable(value: Any) -> Any:
    """The value with paths as text and non-finite numbers as JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return json_number(value) if isinstance(value, float) else value

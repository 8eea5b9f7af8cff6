"""What files of strangers may hold: small JSON, of values whose kinds are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_trqam.errors import UserError

LARGEST_JSON = 10_000_000
LARGEST_HEADER = 10_000_000
"""Bytes. A config has thousands; the header of a model with 3e9 weights has 1e5."""
LENGTH = 8
"""Bytes in front of a safetensors file that say how long its header is."""
LONGEST_TEXT, MOST_ENTRIES = 500, 1000
SHOWN = 80
"""So many characters of a stranger's value are shown in a message."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing, too large, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(
                f"{path} has {size / 1e6:.0f} MB, and a file of settings at most "
                f"{LARGEST_JSON / 1e6:.0f}"
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a policy folder holds {path.name}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a file of settings") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    return fields


def check_header(path: Path) -> None:
    """Whether the header that a safetensors file declares can be one.

    Raises:
        UserError: it is longer than the file or than any model's.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            declared = int.from_bytes(file.read(LENGTH), "little")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size < LENGTH or declared > min(LARGEST_HEADER, size - LENGTH):
        raise UserError(
            f"{path} is not a readable safetensors file: its {size} bytes declare a header of "
            f"{declared}"
        )


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def shown(value: Any) -> str:
    """A stranger's value in a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


@dataclass(frozen=True)
class Kind:
    """What a setting may be."""

    name: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.name} or {other.name}", lambda v: self.fits(v) or other.fits(v))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_feature(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"type", "shape"}:
        return False
    shape = value["shape"]
    sizes = isinstance(shape, list) and len(shape) <= 8 and all(map(_is_size, shape))
    return sizes and _is_text(value["type"])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1_000_000


def _all(fits: Callable[[Any], bool], values: Any) -> bool:
    return len(values) <= MOST_ENTRIES and all(map(fits, values))


def among(*choices: str) -> Kind:
    """One of some texts."""
    return Kind(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)


def between(low: float, high: float) -> Kind:
    """A number in a range."""
    return Kind(f"a number from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high)


def some(kind: Kind, most: int = MOST_ENTRIES) -> Kind:
    """A list."""
    return Kind(
        f"a list of at most {most}, each {kind.name}",
        lambda v: isinstance(v, list) and len(v) <= most and all(map(kind.fits, v)),
    )


TEXT = Kind("a text", _is_text)
BOOLEAN = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a number", _is_number)
SIZE = Kind("a whole number from 0 to 1000000", _is_size)
NOTHING = Kind("null", lambda v: v is None)
TEXTS = some(TEXT)
NAMES = Kind(
    "texts by name",
    lambda v: isinstance(v, dict) and _all(_is_text, v) and _all(_is_text, v.values()),
)
FEATURES = Kind(
    "features, each with a type and a shape",
    lambda v: isinstance(v, dict) and _all(_is_text, v) and _all(_is_feature, v.values()),
)

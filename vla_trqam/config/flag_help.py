"""What ``--help`` prints: every flag, its value where none is given, and what it means."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from vla_trqam.config.methods import TYPE, MethodChoice
from vla_trqam.methods.base import MethodConfig
from vla_trqam.methods.registry import METHODS, name_of

ENTRY = re.compile(r"^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def help_text(config: Any, program: str, presets: Path, names: list[str], preset: str) -> str:
    """The flags of a configuration.

    Args:
        config: a dataclass of dataclasses, as it is without flags.
        program: the command's name.
        presets: the file of presets.
        names: its presets.
        preset: that ``config`` is of.
    """
    head = (
        f"usage: {program} [--preset=NAME | --config_path=FILE] [--name=value ...]\n\n"
        f"--preset=NAME: a section of {presets.name}: {', '.join(names)}\n"
        "--config_path=FILE: the config.yaml of another run\n"
        "A value is YAML: 3, 0.5, true, null, [256, 256]. The values below are those of "
        f"--preset={preset}.\n"
    )
    return head + "\n".join(_lines(config, ""))


def attribute_docs(config_class: type) -> dict[str, str]:
    """Meaning of the fields, from the ``Attributes:`` of a class and those it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for names, meaning in ENTRY.findall(text):
            docs |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return docs


def _choices(hint: Any) -> list[str]:
    """The words of a Literal, or of one that may be null."""
    hints = [hint] if get_origin(hint) is Literal else get_args(hint)
    return [str(word) for h in hints if get_origin(h) is Literal for word in get_args(h)]


def _lines(config: Any, prefix: str) -> Iterator[str]:
    docs, hints = attribute_docs(type(config)), get_type_hints(type(config))
    if not prefix:
        yield ""
    groups = [f for f in dataclasses.fields(config) if _is_group(config, f)]
    # What stands behind a group's heading is read as the group's.
    for field in [*(f for f in dataclasses.fields(config) if f not in groups), *groups]:
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if field in groups:
            yield f"\n{name}: {(type(value).__doc__ or '').strip().splitlines()[0]}"
            if hints[field.name] is MethodChoice:
                yield f"  --{TYPE}={name_of(cast('MethodConfig', value))}"
                yield f"      Which method, with the knobs below. One of {', '.join(METHODS)}."
            yield from _lines(value, f"{name}.")
        else:
            yield f"  --{name}={as_yaml(value)}"
            meaning = re.sub(r"\bNone\b", "null", docs[field.name].replace("``", ""))
            if choices := _choices(hints[field.name]):
                meaning += f" One of {', '.join(choices)}."
            yield textwrap.fill(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _is_group(config: Any, field: dataclasses.Field[Any]) -> bool:
    return dataclasses.is_dataclass(getattr(config, field.name))


def as_yaml(value: Any) -> str:
    """A setting's value as it is given on a command line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)

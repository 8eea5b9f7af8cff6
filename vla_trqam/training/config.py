"""Settings from three places, in this order: the code's defaults, a preset, the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import draccus
import yaml

from vla_trqam.errors import UserError

Settings = dict[str, Any]


def parse_config[C](
    config_class: type[C], presets: Path, arguments: Sequence[str], *, preset: str = "default"
) -> C:
    """Reads ``--preset=NAME`` or ``--config_path=FILE``, and dotted flags, which win.

    Args:
        config_class: a dataclass of dataclasses.
        presets: YAML file with one section a preset.
        arguments: the command line without the program.
        preset: the preset where none is named.

    Raises:
        UserError: an unknown preset, flag or value.
        SystemExit: ``--help``, after the list of flags.
    """
    if "--help" in arguments or "-h" in arguments:
        draccus.parse(config_class, args=["--help"])
    flags = _read_flags(arguments)
    config_path = flags.pop("config_path", None)
    name = flags.pop("preset", preset)
    settings = _flatten(_section(presets, name) if config_path is None else _read_yaml(config_path))
    return _decode(config_class, settings | flags)


def saved_config[C](config_class: type[C], path: Path) -> C:
    """Reads what :func:`dump_config` wrote.

    Raises:
        UserError: the file is missing or is not such a configuration.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; there is no run to go on with")
    return _decode(config_class, _flatten(_read_yaml(path)))


def dump_config(config: Any, path: Path) -> None:
    """Writes a configuration that ``--config_path`` reads back."""
    path.write_text(str(draccus.dump(config)))


def _decode[C](config_class: type[C], settings: Settings) -> C:
    known = _known_flags(config_class)
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists every flag"
            raise UserError(f"--{name} is not a setting; {hint}")
    try:
        decoded: C = draccus.decode(config_class, _nest(settings))
    except Exception as error:  # draccus wraps whatever a value's own check raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise UserError(f"a setting has a bad value: {' '.join(str(error).split())}") from None
    return decoded


def _known_flags(config_class: type, prefix: str = "") -> set[str]:
    flags: set[str] = set()
    for name, hint in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            flags |= _known_flags(hint, f"{prefix}{name}.")
        else:
            flags.add(prefix + name)
    return flags


def _read_flags(arguments: Sequence[str]) -> Settings:
    """``--name=value`` and ``--name value``; values are YAML, a name alone means true."""
    flags: Settings = {}
    items = list(arguments)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise UserError(f"{item!r} is no flag; flags look like --name=value")
        name, equals, text = item[2:].partition("=")
        if not equals:
            text = "true" if not items or items[0].startswith("--") else items.pop(0)
        try:
            flags[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            flags[name] = text
    return flags


def _flatten(section: Settings, prefix: str = "") -> Settings:
    flat: Settings = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _nest(settings: Settings) -> Settings:
    nested: Settings = {}
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


def _section(presets: Path, name: str) -> Settings:
    sections = _read_yaml(presets)
    if name not in sections:
        raise UserError(f"--preset={name} is not known; there are {', '.join(sections)}")
    section: Settings = sections[name]
    return section


def _read_yaml(path: str | Path) -> Settings:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; it must be a YAML mapping")
    return content

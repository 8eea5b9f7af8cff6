"""Settings from three places, in this order: the code's defaults, a preset, the command line."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import draccus
import yaml

from vla_trqam.config.flag_help import as_yaml, help_text
from vla_trqam.config.former import (
    FORMER,
    OF_FORMER,
    former_values,
    name_today,
    of_former_run,
    of_today,
)
from vla_trqam.config.methods import DEFAULT_TYPE, TYPE, MethodChoice, knobs_of, with_chosen_type
from vla_trqam.config.settings import RunSettings
from vla_trqam.errors import UserError, one_line
from vla_trqam.files import written_durably
from vla_trqam.launched import launched_first
from vla_trqam.methods.base import MethodConfig
from vla_trqam.methods.registry import METHODS, name_of

Settings = dict[str, Any]
YAML_START, YAML_END = b"---\n", b"\n...\n"
"""Of a document that :func:`dump_config` wrote; older ones have neither."""


def parse_config[C](
    config_class: type[C],
    presets: Path,
    arguments: Sequence[str],
    *,
    preset: str = "default",
    begun: str | None = None,
) -> C:
    """Reads ``--preset=NAME`` or ``--config_path=FILE``, and dotted flags, which win.

    Args:
        config_class: a dataclass of dataclasses.
        presets: YAML file with one section a preset.
        arguments: the command line without the program.
        preset: the preset where none is named.
        begun: name of the file of settings in the folder of a run. With ``--resume=true`` and
            neither preset nor file, the flags are beside those of the run.

    Raises:
        UserError: an unknown preset, flag or value.
        SystemExit: ``--help``, after the list of flags.
    """
    known = _known_flags(config_class)
    if "--help" in arguments or "-h" in arguments:
        others = [item for item in arguments if item not in ("--help", "-h")]
        flags = of_today(_read_flags(others, known))
        preset = str(flags.get("preset", preset))
        chosen = {name: flags[name] for name in flags if name == TYPE}
        section = _flatten(_section(presets, preset), known)
        section |= _between(config_class, preset, section, flags)
        section = _merged(section, chosen, known)
        program, names = Path(sys.argv[0]).name, list(_read_yaml(presets))
        print(help_text(_decode(config_class, section), program, presets, names, preset))
        raise SystemExit(0)
    flags = of_today(_read_flags(arguments, known))
    if {"config_path", "preset"} <= flags.keys():
        raise UserError("--config_path and --preset are both given; choose one")
    own = None if begun is None else _begun(flags, begun)
    if own is not None:
        saved = _flatten(settings_of(saved_config(config_class, own)), known)
        return _decode(config_class, _merged(saved, flags, known))
    config_path, name = flags.pop("config_path", None), str(flags.pop("preset", preset))
    if config_path is None:
        section = of_today(_flatten(_section(presets, name), known))
        section |= _between(config_class, name, section, flags)
        return _decode(config_class, _merged(section, flags, known))
    settings = of_former_run(_flatten(_read_yaml(str(config_path)), known))
    former = former_values(settings) if OF_FORMER in settings else {}
    _tell_former(str(config_path), former.keys() - flags.keys())
    return _decode(config_class, _merged(settings | former, flags, known))


def _begun(flags: Settings, name: str) -> Path | None:
    """The settings of the run that is gone on with, where nothing else is named to begin with."""
    folder = flags.get("output_dir")
    if not flags.get("resume") or WHOLE & flags.keys() or folder is None:
        return None
    path = Path(folder) / name
    return path if path.is_file() else None


def _between(config_class: type, preset: str, section: Settings, flags: Settings) -> Settings:
    """What the preset and the flags together decide, below the flags."""
    if not issubclass(config_class, RunSettings):
        return {}
    return config_class.between(preset, section, flags)


def _merged(settings: Settings, flags: Settings, known: Collection[str]) -> Settings:
    """A preset or file with the command line's flags, which may choose another ``type``.

    The preset's other settings of what has another type are of the type that it chose, and do not
    stay.
    """
    others = tuple(
        name.removesuffix("type")
        for name, value in flags.items()
        if name.endswith(".type") and value is not None and settings.get(name, value) != value
    )
    kept = {name: value for name, value in settings.items() if not name.startswith(others)}
    return with_chosen_type(kept, flags) if TYPE in known else kept | flags


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The names of today, with their dashes, of the flags on a command line."""
    names = (item[2:].partition("=")[0] for item in arguments if item.startswith("--"))
    return {f"--{name_today(name)}" for name in names}


FREE = {"on_divergence", "log_with", "eval.chunk_deadline"}
"""Settings that a resumed run may have otherwise, beside the number of threads."""
ALLOWED = {"resume", "output_dir", "num_threads", "checkpoint"} | FREE
WHOLE = {"preset", "config_path"}
"""Flags that stand for many settings."""
MOST = 3
"""Settings that a message names."""
MoreUpdates = Callable[[Any, Mapping[str, int]], None]
"""Refuses numbers of updates, by flag, that a run with these settings cannot be gone on with."""


def resumed_config[C: RunSettings](
    config: C, name: str, arguments: Sequence[str], check_more: MoreUpdates
) -> C:
    """The settings of the run in ``config.output_dir``, to go on with it.

    Args:
        config: what the command line alone gives.
        name: the configuration's file in the run's folder.
        arguments: the command line.
        check_more: looks at the numbers of updates that the command line gives.

    Raises:
        UserError: there is no such run, or the command line has settings that are not the run's.
    """
    if config.output_dir is None:
        raise UserError("--resume=true needs --output_dir, the folder of the run to go on with")
    given = {flag.removeprefix("--") for flag in given_flags(arguments)}
    path = config.output_dir / name
    saved = saved_config(type(config), path)
    known = _known_flags(type(config))
    _tell_former(str(path), _former(of_former_run(_flatten(_read_yaml(path), known)), type(config)))
    asked, kept = (_flatten(settings_of(each), known) for each in (config, saved))
    _check_kept(given - ALLOWED - config.GROWING.keys(), asked, kept, config.GROWING)
    wanted = {flag: asked[flag] for flag in config.GROWING if flag in given}
    check_more(saved, wanted)
    saved = with_settings(saved, wanted | {flag: asked[flag] for flag in FREE & given})
    saved.resume, saved.output_dir = True, config.output_dir
    saved.checkpoint = config.checkpoint
    saved.num_threads = config.num_threads or saved.num_threads
    return saved


def _check_kept(given: set[str], asked: Settings, kept: Settings, growing: Collection[str]) -> None:
    """Refuses flags with which a resumed run would have other settings than it was begun with.

    A preset or a file stands for all of its settings.
    """
    whole = given & WHOLE
    named = given - WHOLE if not whole else asked.keys() - ALLOWED - set(growing)
    other = sorted(name for name in named if asked.get(name) != kept.get(name))
    if not other:
        return
    flags = sorted(f"--{name}" for name in whole | (given & set(other)))
    raise UserError(
        f"a resumed run keeps its settings, but for more of "
        f"{' and '.join(f'--{flag}' for flag in growing)}; leave out {', '.join(flags)}: "
        f"{_told_apart(other, asked, kept)}"
    )


def _told_apart(names: Sequence[str], asked: Settings, kept: Settings) -> str:
    values = [
        f"{name} is {as_yaml(asked.get(name))} here and {as_yaml(kept.get(name))} in the run"
        for name in names[:MOST]
    ]
    more = f", and {len(names) - MOST} more differ" if len(names) > MOST else ""
    return f"{', '.join(values)}{more}"


def check_begun_with(config: RunSettings, path: Path) -> None:
    """Refuses to take a run that was begun with other settings for one with these.

    Args:
        config: what it is to have.
        path: of what :func:`dump_config` wrote then.

    Raises:
        UserError: names the settings that differ.
    """
    known = _known_flags(type(config))
    both = config, saved_config(type(config), path)
    asked, kept = (_flatten(settings_of(each), known) for each in both)
    other = sorted(n for n in asked.keys() - ALLOWED if asked[n] != kept.get(n))
    if other:
        raise UserError(f"{path} has other settings: {_told_apart(other, asked, kept)}")


def chosen_settings(config: RunSettings) -> Settings:
    """What is not as the code has it by itself, by dotted name; a method's beside its type."""
    plain = type(config)()
    plain.method = type(config.method)()
    known = _known_flags(type(config))
    chosen, by_itself = (_flatten(settings_of(each), known) for each in (config, plain))
    return {
        name: value
        for name, value in chosen.items()
        if name == TYPE or value != by_itself.get(name)
    }


def with_settings[C](config: C, changes: Settings) -> C:
    """The same settings but for these, by dotted name.

    Raises:
        UserError: they do not go together.
    """
    known = _known_flags(type(config))
    return _decode(type(config), _flatten(settings_of(config), known) | changes)


def saved_config[C](config_class: type[C], path: Path) -> C:
    """Reads what :func:`dump_config` wrote.

    What an older version had no setting for is as it was then (:data:`FORMER`), so that a run goes
    on as it began.

    Raises:
        UserError: the file is missing or is not such a configuration.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; there is no run to go on with")
    _check_end(path)
    known = _known_flags(config_class)
    try:
        settings = of_former_run(_flatten(_read_yaml(path), known))
        return _decode(config_class, settings | _former(settings, config_class))
    except UserError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(f"{where}{error}") from None


def _former(settings: Settings, config_class: type) -> Settings:
    return former_values(settings) if TYPE in _known_flags(config_class) else {}


def _tell_former(path: str, names: Collection[str]) -> None:
    # Every process reads the same settings.
    for name in sorted(names) if launched_first() else ():
        print(f"{path} is from before there was a {name}: {FORMER[name]}, as it was then")


def _check_end(path: Path) -> None:
    """What is cut away would be taken for a setting that an older version did not have."""
    content = path.read_bytes()
    if content.startswith(YAML_START) and not content.endswith(YAML_END):
        raise UserError(f"{path} is cut short: its last line is not the end that was written")


def dump_config(config: Any, path: Path) -> None:
    """Writes a configuration that ``--config_path`` reads back; no kill leaves half of it."""
    with written_durably(path) as part:
        part.write_text(yaml.safe_dump(settings_of(config), explicit_start=True, explicit_end=True))


def read_settings(path: Path) -> Settings:
    """The settings of a run of any age, nested, by the names of today.

    Raises:
        UserError: the file cannot be read, or holds no mapping.
    """
    return in_todays_names(_read_yaml(path))


def in_todays_names(settings: Settings) -> Settings:
    """A run's settings, nested, whatever their age."""
    return _nest(of_former_run(_flatten(settings, ("rename_map",))))


def settings_of(config: Any) -> Settings:
    """Every setting and its value, nested as in YAML and of YAML's types."""
    hints = get_type_hints(type(config))
    settings: Settings = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, MethodConfig):
            settings[item.name] = {"type": name_of(value), **draccus.encode(value)}
        else:
            settings[item.name] = draccus.encode(value, hints[item.name])
    return settings


OF_OTHERS = {
    "mixed_precision": "it is accelerate's: give it before the recipe",
    "policy.dtype": "weights are loaded as the checkpoint's config.json says (its `dtype`)",
    "policy.num_inference_steps": "here it is --policy.tuned_flow_steps",
    "policy.num_steps": "here it is --policy.tuned_flow_steps",
}
"""What users of LeRobot and accelerate type, and what is right here."""


def _decode[C](config_class: type[C], settings: Settings) -> C:
    chosen = str(settings.get(TYPE, DEFAULT_TYPE))
    known = _known_flags(config_class, chosen)
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists every flag"
            hint = OF_OTHERS.get(name, hint)
            raise UserError(f"--{name} is not a setting; {hint}")
        _check_kind(name, value, known[name])
    try:
        decoded: C = draccus.decode(config_class, _nest(settings))
    except Exception as error:  # draccus wraps whatever a value's own check raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise UserError(f"a setting has a bad value: {one_line(error)}") from None
    return decoded


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuses what draccus would take for something else, or refuse without saying how."""
    kinds = [hint, *get_args(hint)]
    if value is None and type(None) not in kinds:
        raise UserError(f"--{name} needs a value; null is none")
    if isinstance(value, bool) and bool not in kinds:
        raise UserError(f"--{name} needs a value; {str(value).lower()} is none")
    lists = any(get_origin(kind) is tuple for kind in kinds)
    if lists and not isinstance(value, list) and value is not None:
        raise UserError(f"--{name}={value} must be a list, like [{value}]")


def _known_flags(config_class: type, chosen: str | None = None, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, and its type.

    Args:
        config_class: a dataclass of dataclasses.
        chosen: the method whose knobs are settings; None for those of every method.
        prefix: of the names.
    """
    flags: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        name, hint = f"{prefix}{item.name}", hints[item.name]
        if hint is MethodChoice:
            flags[TYPE] = str
            for method in METHODS if chosen is None else [chosen]:
                flags |= {f"{name}.{knob}": kind for knob, kind in knobs_of(method).items()}
        elif dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            flags |= _known_flags(hint, chosen, f"{name}.")
        else:
            flags[name] = hint
    return flags


def _read_flags(arguments: Sequence[str], known: Mapping[str, Any]) -> Settings:
    """``--name=value`` and ``--name value``; values are YAML, a name alone means true.

    A setting that is a text or a path keeps what looks like a number as it is written: 000500.
    """
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
        if _is_text(known.get(name)) and flags[name] is not None:
            flags[name] = flags[name] if isinstance(flags[name], str) else text
    return flags


def _is_text(hint: Any) -> bool:
    """Whether a setting is a text or a path, or may be null besides."""
    kinds = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
    return kinds - {type(None)} in ({str}, {Path})


def _flatten(section: Settings, known: Collection[str], prefix: str = "") -> Settings:
    """By dotted name; a known setting's value stays, though it may be a mapping itself."""
    flat: Settings = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name not in known
        flat |= _flatten(value, known, f"{name}.") if nested else {name: value}
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


class _EachKeyOnce(yaml.SafeLoader):
    """YAML of which nothing is silently lost: PyYAML takes the last of several equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name, count in Counter(named).items():
            if count > 1:
                mark = node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{name} is set twice", mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str | Path) -> Settings:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; it must be a YAML mapping")
    return content

"""What may stand in a policy's processor files, looked at before LeRobot sees them.

LeRobot's loader imports and calls whatever a step names as its ``class``, and some of its
registered steps load code from the Hub. So only those steps pass that the supported policies have,
with the settings that LeRobot writes for them. This module knows no LeRobot: looking costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vla_trqam.data.foreign import (
    BOOLEAN,
    FEATURES,
    NAMES,
    NOTHING,
    NUMBER,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    check_header,
    entries,
    read_json,
    shown,
)
from vla_trqam.errors import UserError

PROCESSOR_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
TRUST = "trust_remote_code"
MOST_STEPS = 64


_NORMALIZER = {
    "eps": NUMBER,
    "features": FEATURES,
    "norm_map": NAMES,
    "normalize_observation_keys": TEXTS | NOTHING,
}
_TOKENS = {
    "max_length": SIZE,
    "task_key": TEXT,
    "padding_side": TEXT,
    "padding": TEXT | BOOLEAN,
    "truncation": BOOLEAN,
}
STEPS: Mapping[str, Mapping[str, Kind]] = {
    "rename_observations_processor": {"rename_map": NAMES},
    "to_batch_processor": {},
    "pi0_new_line_processor": {},
    "smolvla_new_line_processor": {},
    "pi05_prepare_state_tokenizer_processor_step": {"max_state_dim": SIZE, "task_key": TEXT},
    "tokenizer_processor": _TOKENS | {"tokenizer_name": TEXT},
    "tiny_byte_tokenizer": _TOKENS,
    "device_processor": {"device": TEXT, "float_dtype": TEXT | NOTHING},
    "relative_actions_processor": {
        "enabled": BOOLEAN,
        "exclude_joints": TEXTS,
        "action_names": TEXTS | NOTHING,
    },
    "absolute_actions_processor": {"enabled": BOOLEAN},
    "normalizer_processor": _NORMALIZER,
    "unnormalizer_processor": _NORMALIZER,
}
"""The steps of pi0, pi05, smolvla and multi_task_dit and of the tiny ones, and their settings."""


def check_processors(folder: Path) -> Iterator[str]:
    """Looks at the processor files of a folder; those that are not there are left to the host.

    Yields:
        The names of tokenizers in them, which the host loads.

    Raises:
        UserError: something in them is not what LeRobot writes for the supported policies.
    """
    for name in PROCESSOR_FILES:
        path = folder / name
        if not path.exists():
            continue
        for step in _steps(path):
            yield from (v for k, v in step.get("config", {}).items() if k == "tokenizer_name")


def check_no_trust(path: Path, fields: Any) -> None:
    """Raises a UserError where a file wants code from elsewhere to be trusted, at any depth."""
    if any(key == TRUST for key, _ in entries(fields)):
        raise UserError(f"{path} has {TRUST}, and no code that a policy brings is run; remove it")


def _steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a file, all checked."""
    fields = read_json(path)
    check_no_trust(path, fields)
    other = sorted(fields.keys() - {"name", "steps"})
    if other:
        raise UserError(f"{path} has {shown(other[0])}; it may have a name and steps")
    steps = fields.get("steps")
    if not isinstance(steps, list) or len(steps) > MOST_STEPS:
        raise UserError(f"{path} has no list of at most {MOST_STEPS} steps; it is no processor")
    if not TEXT.fits(fields.get("name", "")):
        raise UserError(f"{path}: its name is {shown(fields['name'])}; it must be a text")
    for number, step in enumerate(steps):
        _check_step(f"{path}: step {number}", path.parent, step)
    return steps


def _check_step(where: str, folder: Path, step: Any) -> None:
    if not isinstance(step, dict):
        raise UserError(f"{where} is {shown(step)}; it must have a registry_name")
    if "class" in step:
        raise UserError(
            f"{where} names the class {shown(step['class'])}, and nothing that a file names is "
            "imported; steps of LeRobot's are named by registry_name"
        )
    name = step.get("registry_name")
    if not isinstance(name, str) or name not in STEPS:
        raise UserError(f"{where} is {shown(name)}; known are {', '.join(STEPS)}")
    other = sorted(step.keys() - {"registry_name", "config", "state_file"})
    if other:
        raise UserError(f"{where} ({name}) has {shown(other[0])}; it may have config, state_file")
    _check_settings(f"{where} ({name})", STEPS[name], step.get("config", {}))
    if "state_file" in step:
        _check_state_file(f"{where} ({name})", folder, step["state_file"])


def _check_settings(where: str, known: Mapping[str, Kind], settings: Any) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{where}: its config is {shown(settings)}; it must be a JSON object")
    for key, value in settings.items():
        if key not in known:
            may = ", ".join(known) or "none"
            raise UserError(f"{where} has the setting {shown(key)}; known settings are: {may}")
        if not known[key].fits(value):
            raise UserError(f"{where}: {key} is {shown(value)}; it must be {known[key].name}")


def _check_state_file(where: str, folder: Path, name: Any) -> None:
    """The host reads it from beside the processors, and otherwise asks the Hub for it."""
    plain = isinstance(name, str) and "\\" not in name and Path(name).name == name
    if not plain or not name.endswith(".safetensors") or name.startswith("."):
        raise UserError(
            f"{where}: its state_file is {shown(name)}; it must be the plain name of a "
            ".safetensors file beside it"
        )
    file = folder / name
    if not file.is_file():
        raise UserError(f"{where}: its state_file {shown(name)} is not there")
    if not any(file.resolve().is_relative_to(root) for root in _roots(folder)):
        raise UserError(
            f"{where}: its state_file {shown(name)} is a link out of the folder, to "
            f"{shown(str(file.resolve()))}"
        )
    check_header(file)


def _roots(folder: Path) -> Iterator[Path]:
    """Where a policy's files lie: the folder, or the blobs beside a snapshot in the Hub's cache."""
    own = folder.resolve()
    yield own
    if own.parent.name == "snapshots":
        yield own.parent.parent / "blobs"

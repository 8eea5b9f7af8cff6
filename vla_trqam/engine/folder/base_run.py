"""A run that begins where a run of a base alone ended, instead of making the same base again."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vla_trqam.config.parsing import read_settings
from vla_trqam.engine.base_record import RECORD_NAME, BaseRecord
from vla_trqam.engine.folder.checkpoints import (
    CHECKPOINTS,
    adopt_checkpoint,
    check_whole,
    last_checkpoint,
    read_position,
)
from vla_trqam.engine.folder.pins import Input, read_pins
from vla_trqam.engine.folder.run_folder import BASE_NAME, CONFIG_NAME
from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import UserError
from vla_trqam.files import written_durably

ELSEWHERE = ("dataset.path",)
"""Settings whose files are compared instead."""


def check_base_run(
    base_run: Path, settings: Mapping[str, Any], makes_a_base: Collection[str], data: Input
) -> Path:
    """The checkpoint of a base that is just the one that a run would make by itself.

    Args:
        base_run: folder of the run that made it.
        settings: of the run that is to begin with it, nested.
        makes_a_base: names of the settings, or of sections of them, that a base depends on.
        data: what the run learns from.

    Raises:
        UserError: that run is not finished, or its base is another.
    """
    recorded = BaseRecord.of_run(base_run) is not None
    begun = read_settings(base_run / CONFIG_NAME) if recorded else {}
    if not recorded or begun["steps"] or begun["online"]["steps"]:  # more were given to it later
        raise UserError(
            f"--base_run={base_run} is not the folder of a finished run with --steps=0 "
            "--online.steps=0, which makes a base"
        )
    theirs, own = _flat(begun), _flat(settings)
    for name in sorted(own.keys() | theirs.keys()):
        counts = any(name == part or name.startswith(f"{part}.") for part in makes_a_base)
        if counts and name not in ELSEWHERE and own.get(name) != theirs.get(name):
            raise UserError(
                f"--base_run={base_run} made its base with --{name}={theirs.get(name)}, this run "
                f"has {own.get(name)}; make a base with these settings, or take those"
            )
    pinned = read_pins(base_run).get(data.name)
    for file in data.files:
        facts = None if pinned is None else pinned.files.get(file)
        if data.folder is None or facts is None or not facts.is_still(data.folder / file):
            raise UserError(f"--base_run={base_run} made its base of other data than {data.asked}")
    checkpoint = last_checkpoint(base_run)
    if checkpoint is None:
        raise UserError(f"--base_run={base_run} has lost its checkpoint; make the base again")
    check_whole(checkpoint)
    return checkpoint


def base_input(base_run: Path, checkpoint: Path) -> Input:
    """What is pinned of it."""
    folders = (BASE_NAME, RECORD_NAME, f"{CHECKPOINTS}/{checkpoint.name}")
    found = [p for folder in folders for p in sorted((base_run / folder).rglob("*"))]
    files = [p.relative_to(base_run).as_posix() for p in found if p.is_file()]
    return Input("base", str(base_run), base_run, tuple(files))


def take_base(base_run: Path, checkpoint: Path, output_dir: Path) -> None:
    """Copies the base, its record, its log, and last the checkpoint to go on from.

    Args:
        base_run: the run that made it.
        checkpoint: its last one.
        output_dir: the run's folder, which has its settings and its replay already.
    """
    for name in (BASE_NAME, RECORD_NAME):
        with written_durably(output_dir / name) as part:
            shutil.copytree(base_run / name, part)
    lines = (base_run / METRICS_NAME).read_bytes().splitlines(keepends=True)
    kept = lines[: read_position(checkpoint).metrics_lines]
    with written_durably(output_dir / METRICS_NAME) as part:
        part.write_bytes(b"".join(kept))
    adopt_checkpoint(checkpoint, output_dir)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat

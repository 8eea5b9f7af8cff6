"""A run that is gone on with for more updates than it was begun with, or why that cannot be."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from vla_trqam.config.parsing import dump_config, saved_config, with_settings
from vla_trqam.engine.folder.checkpoints import (
    CHECKPOINTS,
    LAST,
    last_checkpoint,
    named_checkpoint,
    read_position,
)
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.errors import UserError
from vla_trqam.launched import launcher
from vla_trqam.methods.registry import name_of, requirements_of

Restart = Callable[[Any, Path], Sequence[str]]
"""From settings and a checkpoint's folder to the flags of a new run that begins there."""


def setting(config: Any, flag: str) -> Any:
    """The value of a dotted flag."""
    return reduce(getattr, flag.split("."), config)


def check_resumed(asked: Any, saved: Any, wanted: Mapping[str, int], *, restart: Restart) -> None:
    """Refuses numbers of updates that a run cannot be gone on with.

    Raises:
        UserError: there is no such checkpoint; a number shrinks, or grows where step sizes fall or
            in a phase that is over, with the command that starts a new run from the checkpoint.
    """
    folder, phases = asked.output_dir, list(saved.GROWING.values())
    checkpoint = (
        last_checkpoint(folder)
        if asked.checkpoint is None
        else named_checkpoint(folder, asked.checkpoint)
    )
    reached = None if checkpoint is None else read_position(checkpoint).phase
    for flag, count in wanted.items():
        begun = setting(saved, flag)
        if count < begun:
            raise UserError(
                f"--{flag}={count} is fewer than the {begun} of the run in {folder}, which can "
                "only be gone on with for more"
            )
        if count > begun and saved.lr_end != 1.0:
            raise UserError(
                f"--{flag}={count} comes too late: the step sizes of the run in {folder} fall to "
                f"--lr_end={saved.lr_end:g} of them by its last update, and would rise again; "
                "begin one anew with as many"
            )
        own = saved.GROWING[flag]
        if count > begun and reached in phases and phases.index(reached) > phases.index(own):
            late = f"--{flag}={count} comes too late: the run in {folder} is past its {own} updates"
            if not requirements_of(saved.method).host_acts:
                raise UserError(
                    f"{late}, and no other run can begin with what {name_of(saved.method)} learns "
                    "beside the policy: begin one anew with as many"
                )
            flags = [*restart(saved, folder / CHECKPOINTS / LAST), f"--{flag}={count - begun}"]
            raise UserError(
                f"{late}; a new run goes on from its checkpoint: {_new_run(folder, flags)}"
            )


def _new_run(folder: Path, flags: Sequence[str]) -> str:
    own = [f"--config_path={folder / CONFIG_NAME}", "--output_dir=null"]
    return shlex.join([*launcher(), sys.argv[0], *own, *flags])


def save_more_updates(config: Any) -> None:
    """The settings' file of a resumed run has the numbers of updates that it is given now."""
    path = config.output_dir / CONFIG_NAME
    saved = saved_config(type(config), path)
    grown = {
        flag: setting(config, flag)
        for flag in config.GROWING
        if setting(config, flag) != setting(saved, flag)
    }
    if grown:
        dump_config(with_settings(saved, grown), path)
        more = ", ".join(f"--{f}={n} instead of {setting(saved, f)}" for f, n in grown.items())
        print(f"the run is given more updates: {more}")

"""The run's folder while the run works in it: locked, and as it was if nothing comes of the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla_trqam.config.settings import RunSettings
from vla_trqam.engine.folder.begun import begun_replays
from vla_trqam.engine.folder.checkpoints import (
    all_checkpoints,
    check_whole,
    last_checkpoint,
    named_checkpoint,
    take_checkpoint,
)
from vla_trqam.engine.folder.manifest import MANIFEST_NAME
from vla_trqam.engine.folder.more_updates import save_more_updates
from vla_trqam.engine.folder.pins import INPUTS_NAME, check_pins
from vla_trqam.engine.folder.run_folder import (
    BASE_NAME,
    COMMAND_NAME,
    CONFIG_NAME,
    DIVERGED_NAME,
    SET_ASIDE,
    check_launched_alike,
)
from vla_trqam.engine.folder.run_lock import LOCK_NAME, RunLock
from vla_trqam.engine.processes.team import FailedElsewhereError, Team
from vla_trqam.errors import DivergenceError, UserError, one_line
from vla_trqam.files import PART, set_aside

# What a run without a checkpoint begins anew with.
KEPT = (CONFIG_NAME, COMMAND_NAME, INPUTS_NAME, BASE_NAME, LOCK_NAME)
UNBEGUN = (INPUTS_NAME, BASE_NAME, COMMAND_NAME, LOCK_NAME)
"""What a run that was killed before it had settings leaves: there is nothing to go on with."""


def check_output_dir(output_dir: Path, *, resume: bool) -> None:
    """Refuses a folder that a new run would overwrite.

    Raises:
        UserError: it is a file, or something is in it and the run is new.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir} is a file; a run needs a folder")
    if resume or not output_dir.exists():
        return
    names = {path.name for path in output_dir.iterdir()}
    is_run = CONFIG_NAME in names
    if is_run or any(name not in UNBEGUN and not name.startswith(PART) for name in names):
        go_on = ", or go on with that run by --resume=true" if is_run else ""
        raise UserError(f"{output_dir} is in use; choose another --output_dir{go_on}")


@contextmanager
def own_folder(config: RunSettings, team: Team | None = None) -> Iterator[None]:
    """While open, the folder of the settings is this run's alone; every process of it calls this.

    A new run's folder is made. Whatever ends the run by an exception before its first checkpoint:
    what this run made in the folder is removed, and the same command works again; but data that a
    job has begun to read (:mod:`vla_trqam.engine.folder.begun`) stay, unless its preflight refused
    the run or it diverged. Of a run that diverged after it, the folder says so, until it is gone on
    with.

    Raises:
        UserError: another process works in the folder; it is in use or cannot be made; or the
            checkpoint to go on from is damaged.
    """
    assert config.output_dir is not None
    team, folder = team or Team(), _OwnFolder(config.output_dir)
    try:
        team.on_main(lambda: folder.open(config, team))
        yield
    except DivergenceError as error:
        folder.give_up()
        if team.is_main:
            folder.tell(error)
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        # What failed elsewhere need not have been refused there.
        elsewhere = isinstance(error, FailedElsewhereError)
        folder.break_off(refused=isinstance(error, UserError) and not elsewhere)
        raise
    finally:
        folder.close()


class _OwnFolder:
    """What the main process does in the folder; on the others, none of it is called but the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, RunLock(path)
        self._made: list[Path] = []
        self._before: set[Path] | None = None

    def open(self, config: RunSettings, team: Team) -> None:
        check_output_dir(self._path, resume=True)  # what it holds is looked at under the lock
        self._make()
        self._lock.take()
        check_output_dir(self._path, resume=config.resume)
        if config.resume:
            check_pins(self._path)
            if config.checkpoint is None:
                _look_back(self._path, team)
            else:
                check_whole(named_checkpoint(self._path, config.checkpoint))
        self._before = set(self._path.iterdir())

    def break_off(self, *, refused: bool) -> None:
        """Leaves what has been read of the data, with the settings to go on with it."""
        begun = begun_replays(self._path).values()
        whole = bool(begun) and (self._path / CONFIG_NAME).is_file()
        if not whole or (refused and not any(each.checked for each in begun)):
            self.give_up()
        elif self._before is not None and not all_checkpoints(self._path):
            print(
                f"what was read of the data is kept in {self._path}: --resume=true goes on with it "
                "as it was begun; a run with other settings begins in another folder"
            )

    def give_up(self) -> None:
        """Removes what this run made, unless it got as far as a checkpoint."""
        if self._before is not None and not all_checkpoints(self._path):
            for path in set(self._path.iterdir()) - self._before:
                _remove(path)
        self._lock.release()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def tell(self, error: DivergenceError) -> None:
        """Leaves the sentence in a folder that is kept."""
        if self._path.is_dir():
            (self._path / DIVERGED_NAME).write_text(f"{one_line(error)}\n")

    def close(self) -> None:
        self._lock.release()

    def _make(self) -> None:
        missing = [path for path in (self._path, *self._path.parents) if not path.exists()]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir={self._path} cannot be made: {error.strerror}") from None
        self._made = missing


def go_back(config: RunSettings, team: Team) -> None:
    """The checkpoint that a run is to go on from becomes its last, once all else is right.

    Raises:
        UserError: the run has other processes than that checkpoint.
    """
    output_dir, name = config.output_dir, config.checkpoint
    assert output_dir is not None
    if not config.resume or name is None:
        return
    check_launched_alike(named_checkpoint(output_dir, name), team)
    later = take_checkpoint(output_dir, name)
    kept = set_aside(later, output_dir, SET_ASIDE)
    if kept is not None:
        names = ", ".join(path.name for path in later)
        print(f"going back to the checkpoint {name}; those after it ({names}) are in {kept}")


def begin_again(config: RunSettings) -> None:
    """Before the first update: a run that is gone on with may be given more of them.

    What ends it before leaves its settings as they were, and the word that it has diverged.
    """
    assert config.output_dir is not None
    if config.resume:
        save_more_updates(config)
        (config.output_dir / DIVERGED_NAME).unlink(missing_ok=True)


def _look_back(output_dir: Path, team: Team) -> None:
    """Before a run is gone on with: its checkpoint is whole, or it begins anew and says so."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is not None:
        check_whole(checkpoint)
        if not (checkpoint / MANIFEST_NAME).is_file():
            print(f"{checkpoint} has no {MANIFEST_NAME}: older versions wrote no checksums")
        return
    alike = team.size, team.precision
    begun = [
        path
        for path, each in begun_replays(output_dir).items()
        if (each.processes, each.precision) == alike
    ]
    left = [
        path
        for path in sorted(output_dir.iterdir())
        if path.name not in KEPT and not path.name.startswith(SET_ASIDE) and path not in begun
    ]
    kept = set_aside(left, output_dir, SET_ASIDE)
    names = ", ".join(path.name for path in left)
    read = ", with what had been read of its data" if begun else ""
    moved = "" if kept is None else f"; what was there ({names}) is kept in {kept}"
    print(f"{output_dir} has no checkpoint, so the run begins anew{read}{moved}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Another process of the run may still be writing: what it leaves is not worth an error.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

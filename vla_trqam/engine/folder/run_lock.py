"""One run, one folder: the lock that says so."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vla_trqam.errors import UserError

LOCK_NAME = "run.lock"


class RunLock:
    """Held by the one run that works in a folder; the system frees it however that run ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock, until :meth:`release` or the end of the process.

        Raises:
            UserError: another process has it, or nothing can be written in the folder.
        """
        path = self._folder / LOCK_NAME
        while self._descriptor is None:
            try:
                # Python's descriptors are not inherited: a simulator's process does not hold it.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(
                    f"another process is at work in {self._folder}; wait until it ends, or choose "
                    "another --output_dir"
                ) from None
            if _is(path, descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)  # its holder has removed it in between

    def release(self) -> None:
        """Gives the lock up and removes its file; harmless when it is not held."""
        if self._descriptor is not None:
            (self._folder / LOCK_NAME).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def at_work(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False

"""Files and folders that bear their name only when they are whole, and stay when power is cut."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part."
"""Begins the name of what is being written."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write a file, folder or link to; it then takes the name.

    An exception leaves what was there before. So does a kill, beside a part that no reader looks at
    and the next writer of that name removes.
    """
    # The suffix stays at the end, for writers that tell the format by it.
    part = path.with_name(f"{PART}{path.name}")
    _remove(part)
    try:
        yield part
        if _is_folder(path):
            discard(path)  # a rename does not replace a folder with something in it
        os.replace(part, path)
    finally:
        _remove(part)


@contextmanager
def written_durably(path: Path) -> Iterator[Path]:
    """As :func:`written_whole`; and what has the name survives a power cut, not just a kill."""
    with written_whole(path) as part:
        yield part
        sync_tree(part)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Deletes a folder that others look for; a kill leaves it under a name that none looks at."""
    old = folder.with_name(f".part.old.{folder.name}")
    _remove(old)
    os.replace(folder, old)
    shutil.rmtree(old)


def set_aside(paths: Iterable[Path], root: Path, prefix: str) -> Path | None:
    """Moves what is in a folder to a new one in it, ``root/prefixN``, which is returned.

    Nothing is copied. Without anything to move there is no new folder.
    """
    there = [path for path in paths if path.exists() or path.is_symlink()]
    if not there:
        return None
    numbers = itertools.count(1)
    target = next(p for n in numbers if not (p := root / f"{prefix}{n}").exists())
    for path in there:
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    return target


def sync_tree(path: Path) -> None:
    """Waits until the disk itself has a file, or a folder and everything in it."""
    if path.is_symlink():
        return  # lies in its folder
    if path.is_dir():
        for entry in path.iterdir():
            sync_tree(entry)
    sync(path)


def sync(path: Path) -> None:
    """Waits until the disk itself has a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

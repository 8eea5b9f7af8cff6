"""Files and folders that bear their name only when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write a file, folder or link to; it then takes the name.

    An exception leaves what was there before. So does a kill, beside a part that no reader looks at
    and the next writer of that name removes.
    """
    # The suffix stays at the end, for writers that tell the format by it.
    part = path.with_name(f".part.{path.name}")
    _remove(part)
    try:
        yield part
        if _is_folder(path):
            shutil.rmtree(path)  # a rename does not replace a folder with something in it
        os.replace(part, path)
    finally:
        _remove(part)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

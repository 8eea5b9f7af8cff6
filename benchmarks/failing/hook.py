"""A recipe in which a disk or the process itself fails at one chosen file operation.

    python benchmarks/failing/hook.py \
        '{"folder": "out", "area": "replay", "act": "kill", "at": 7}' \
        recipes/finetune_robomimic.py --output_dir=out

Python tells an audit hook of every file that it opens, makes, renames or removes *before* it does
so. The hook counts those that write below an area of the run's folder, and acts at the chosen one:
``kill`` is ``kill -9``; ``full`` refuses it and all that follow, as a full disk does. ``count``
only counts, and writes the numbers to ``counts`` at the end.
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Area = Literal["anywhere", "checkpoints", "replay"]
Act = Literal["count", "kill", "full"]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}
"""Events whose every instance changes the disk; a replacement is a rename to Python."""
GROWS = {"os.mkdir", "os.symlink"}
"""Those of them that a full disk refuses."""


@dataclass
class Fault:
    """What happens, and where.

    Attributes:
        folder: of the run.
        area: below which operations are counted.
        act: what to do at the chosen one.
        at: its number, from 1.
        counts: file for the numbers of operations by area, of ``count``.
    """

    folder: str
    area: Area = "anywhere"
    act: Act = "count"
    at: int = 0
    counts: str | None = None
    seen: Counter[str] = field(default_factory=Counter)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        path = _changed(event, arguments)
        if path is None or not path.startswith(self.folder):
            return
        for area in _areas(path.removeprefix(self.folder)):
            self.seen[area] += 1
        if self.act == "count" or self.seen[self.area] < self.at:
            return
        if self.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" or event in GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _changed(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an event is about to change; None where it changes none."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & WRITING:
            return None
    elif event in CHANGES:
        # Of a link the first argument is what it points to.
        path = arguments[1] if event in ("os.symlink", "os.rename") else arguments[0]
    else:
        return None
    # A file that is open already has a number for a name, a temporary one may have bytes.
    if not isinstance(path, str | os.PathLike):
        return None
    return os.path.abspath(path)


def _areas(below: str) -> list[str]:
    top = below.strip("/").partition("/")[0]
    return ["anywhere", *(area for area in ("checkpoints", "replay") if top.startswith(area))]


def main(arguments: list[str]) -> None:
    """Arms the hook and becomes the recipe."""
    described, program, *flags = arguments
    fault = Fault(**json.loads(described))
    fault.folder = os.path.abspath(fault.folder)
    sys.addaudithook(fault)
    sys.argv = [program, *flags]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        if fault.counts is not None:
            Path(fault.counts).write_text(json.dumps(fault.seen))


if __name__ == "__main__":
    main(sys.argv[1:])

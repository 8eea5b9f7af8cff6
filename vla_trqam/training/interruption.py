"""Ctrl-C and SIGTERM end a run at the next whole update, after a checkpoint."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Self

from vla_trqam.training.distributed import launcher

MESSAGE = b"\nstopping after this update and its rollouts; once more to stop at once\n"


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and its state is saved."""


class InterruptGuard:
    """While open, the first Ctrl-C or SIGTERM only sets :attr:`requested`; a second one acts.

    Args:
        quiet: say nothing, for another process does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self._quiet = quiet
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._quiet:
            return
        # Not print: the signal may have come in the middle of one.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, MESSAGE)


def how_to_go_on(output_dir: Path | None, where: str) -> str:
    """The last sentence of a run that was asked to stop.

    Args:
        output_dir: the run's folder; None before there is one.
        where: what :class:`Interrupted` said; empty when the run stopped at once.
    """
    stopped = f"stopped at {where}" if where else "stopped"
    if output_dir is None:
        return f"{stopped} before anything was written"
    return (
        f"{stopped}; go on with: {shlex.join(launcher())} {shlex.quote(sys.argv[0])} "
        f"--resume=true --output_dir={shlex.quote(str(output_dir))}"
    )

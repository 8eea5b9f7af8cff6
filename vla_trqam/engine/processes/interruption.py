"""What ends a run from outside: Ctrl-C, SIGTERM, a terminal that closes, a launcher that dies."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

from vla_trqam.launched import launcher

MESSAGE = b"\nstopping after this update and its rollouts; once more to stop at once\n"
LAUNCHER_DIED = signal.SIGUSR2
"""Sent when the launcher ends: told apart from what a user sends, for it comes after that."""
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch"} | {
    *("torchrun", "torch.distributed.run", "torch.distributed.launch")
}
ECHO = 2.0
"""Seconds in which one wish to stop may come twice.

torchrun sends on what the terminal has sent its processes already; and where a batch system signals
every process of a job, so does a study, by Ctrl-C.
"""
_PR_SET_PDEATHSIG = 1


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and its state is saved."""


class InterruptGuard:
    """While open, the first signal to stop only sets :attr:`requested`.

    Ctrl-C and SIGTERM act when they come again, but not the one right after the other. A terminal
    that closes (SIGHUP) and a launcher that dies come along with others, and only ever ask.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self._quiet = quiet
        self._previous: dict[signal.Signals, object] = {}
        self._first = (0, -ECHO)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, *_stops()):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
            if isinstance(handler, _Stop):
                handler.asked |= self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if self.requested:
            if number in (signal.SIGINT, signal.SIGTERM) and not self._is_echo(number):
                raise KeyboardInterrupt
            return
        self.requested, self._first = True, (number, time.monotonic())
        if self._quiet:
            return
        # Not print: the signal may have come in the middle of one.
        with suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, MESSAGE)

    def _is_echo(self, number: int) -> bool:
        first, when = self._first
        is_another = number != first or "TORCHELASTIC_RUN_ID" in os.environ
        return is_another and time.monotonic() - when < ECHO


def _leave_closed_terminal() -> None:
    """What is printed from here on goes nowhere: to a closed terminal it would fail, and so end us.

    What a file or a pipe takes is still written there.
    """
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


class _Stop:
    """Ends the program by an exception, once: a second one would cut the tidying short."""

    def __init__(self) -> None:
        self.asked, self._acted = False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        late = self.asked and number in (signal.SIGHUP, LAUNCHER_DIED)
        if not self._acted and not late:
            self._acted = True
            raise KeyboardInterrupt


@contextmanager
def stops_as_ctrl_c() -> Iterator[None]:
    """While open, whatever ends the program from outside does so by an exception, as Ctrl-C does.

    So it tidies up what it began, and the launcher's end is its own.
    """
    stop = _Stop()
    previous = {number: signal.signal(number, stop) for number in _stops()}
    try:
        with _ends_with_launcher():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stops() -> list[signal.Signals]:
    """Every signal to stop but Ctrl-C; SIGHUP only where it is not ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, LAUNCHER_DIED, *([] if ignored else [signal.SIGHUP])]


@contextmanager
def _ends_with_launcher() -> Iterator[None]:
    """Linux tells this process when its launcher dies; without one, nothing happens.

    `accelerate launch` does not hand signals on: killed by itself, it would leave an orphan.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not is_launcher(parent):
        yield
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, int(LAUNCHER_DIED))
    if os.getppid() != parent:  # it died before it was asked about
        os.kill(os.getpid(), LAUNCHER_DIED)
    try:
        yield
    finally:
        prctl(_PR_SET_PDEATHSIG, 0)


def is_launcher(process: int) -> bool:
    """Whether a process is accelerate's or torch's launcher, by its command line."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # Interpreter, its flags, then the launcher; the recipe's own flags come later.
    return any(Path(word).name in LAUNCHERS for word in words[:4])


def how_to_go_on(output_dir: Path | None, where: str) -> str:
    """The last sentence of a run that was asked to stop."""
    stopped = f"stopped at {where}" if where else "stopped"
    if output_dir is None:
        return f"{stopped} before the first checkpoint: nothing is kept, begin again"
    return (
        f"{stopped}; go on with: {shlex.join(launcher())} {shlex.quote(sys.argv[0])} "
        f"--resume=true --output_dir={shlex.quote(str(output_dir))}"
    )

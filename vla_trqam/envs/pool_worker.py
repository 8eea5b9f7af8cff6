"""A simulator's process as its pool sees it: asked, waited for not too long, and replaced."""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from vla_trqam.envs.worker import WorkerSettings
from vla_trqam.errors import UserError

Job = TypeVar("Job")

COMMAND = (sys.executable, "-m", "vla_trqam.envs.worker")
MAX_REPLACEMENTS = 3
"""Of one episode's process: an accident of the machine hardly ever comes twice, and what comes a
fourth time is the task's own."""
START_DEADLINE = 600.0
"""Seconds for imports, the model and compiled code: 8 to 30 on an idle machine."""
_GRACE = 10.0
"""Seconds in which a process whose connection ended may end by itself, for its exit code."""
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class LostWorkerError(Exception):
    """A simulator process died or does not answer; the message says what it did."""


class SlowWorkerError(LostWorkerError):
    """It does not answer."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a worker may take: for a reset or a chunk's steps, and to make its simulator."""

    chunk: float
    start: float = START_DEADLINE

    def __post_init__(self) -> None:
        if not 0.0 < self.chunk < math.inf:
            raise UserError(
                f"chunk_deadline is {self.chunk}; it must be a positive number of seconds."
            )

    def of(self, request: str) -> float:
        """The one of a request."""
        return self.start if request == "make" else self.chunk


class Worker(Generic[Job]):  # noqa: UP046 (mypy of the class attribute)
    """One process and the connection to it.

    Attributes:
        spaces: observation size O and action size A, once the environment is made.
        job: what its pool has it do.
        request: the kind of the last one.
    """

    def __init__(self, settings: WorkerSettings, deadlines: Deadlines) -> None:
        self.settings, self.deadlines = settings, deadlines
        self.spaces: tuple[int, int] | None = None
        self.job: Job | None = None
        ours, theirs = socket.socketpair()
        # A process that stops in the middle of a message must not hold up its reader for ever.
        _give_up_after(ours, deadlines.chunk)
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict.fromkeys(_THREAD_VARIABLES, "1"),
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
            )
        self.connection = Connection(ours.detach())
        self.request, self._due = "make", time.monotonic() + deadlines.start
        with suppress(OSError):  # the first `receive` finds one that is gone already
            self.connection.send(("make", settings))

    def ask(self, request: str, *arguments: Any) -> None:
        """Sends a request, see `vla_trqam.envs.worker`; the clock of its deadline starts.

        Raises:
            LostWorkerError: the process is gone or stopped.
        """
        self.request = request
        self._due = time.monotonic() + self.deadlines.of(request)
        self._transfer(lambda: self.connection.send((request, *arguments)))

    @property
    def seconds_left(self) -> float:
        """Until the deadline of the request under way; not below 0."""
        return max(self._due - time.monotonic(), 0.0)

    def check_deadline(self) -> None:
        """Passes where the reply is there, for its reader may be late, or may still come in time.

        Raises:
            SlowWorkerError: neither.
        """
        if self.seconds_left == 0.0 and not self.connection.poll():
            raise self._slow()

    def await_start(self) -> tuple[int, int]:
        """The spaces, once the environment is made.

        Raises:
            LostWorkerError: see `receive`, or it takes too long. Others: see `receive`.
        """
        if self.spaces is None:
            if not self.connection.poll(self.seconds_left):
                raise self._slow()
            self.receive()
        assert self.spaces is not None
        return self.spaces

    def receive(self) -> tuple[Any, ...]:
        """The next reply, which is there or on its way; failures over there are raised here.

        Raises:
            LostWorkerError: the process died, or stopped in the middle of the reply.
            UserError: the environment cannot be made as asked.
            RuntimeError: it failed; its traceback is in the message.
        """
        reply: tuple[Any, ...] = self._transfer(self.connection.recv)
        if reply[0] == "user_error":
            raise UserError(reply[1])
        if reply[0] == "error":
            raise RuntimeError(f"a simulator process failed:\n{reply[1]}")
        if reply[0] == "spaces":
            self.spaces = reply[1], reply[2]
        return reply

    def stop(self) -> None:
        """End the process at once, a stopped one too; it holds nothing that needs saving."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def replaced(self, loss: LostWorkerError, doing: str, times: int) -> Worker[Job]:
        """A new process for this one, which is lost; it has the same job, to be begun anew.

        Args:
            loss: what happened.
            doing: what the process was at, to follow "did not answer".
            times: how often that has happened now.

        Raises:
            UserError: it has happened too often.
        """
        self.stop()
        if times > MAX_REPLACEMENTS:
            hint = "; a slow simulator needs a longer --eval.chunk_deadline"
            raise UserError(
                f"a simulator process {loss} {doing}, and so did the {MAX_REPLACEMENTS} that took "
                f"its place{hint if isinstance(loss, SlowWorkerError) else ''}"
            ) from loss
        sentence = f"a simulator process {loss} {doing}: it is replaced"
        tqdm.write(f"{sentence} ({times} of at most {MAX_REPLACEMENTS} times)", file=sys.stderr)
        successor: Worker[Job] = Worker(self.settings, self.deadlines)
        successor.job = self.job
        return successor

    def _transfer(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except BlockingIOError:
            raise self._slow() from None
        except (EOFError, OSError) as error:
            raise LostWorkerError(self._end()) from error

    def _slow(self) -> SlowWorkerError:
        return SlowWorkerError(f"did not answer for {self.deadlines.of(self.request):g} s")

    def _end(self) -> str:
        try:
            code = self._process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        names = {number.value: number.name for number in signal.Signals}
        if code < 0:
            return f"was killed by {names.get(-code, f'signal {-code}')}"
        return f"ended with exit code {code}"


def _give_up_after(own: socket.socket, seconds: float) -> None:
    """Reads and writes that make no progress for so long fail with a `BlockingIOError`."""
    whole, part = divmod(seconds, 1.0)
    limit = struct.pack("ll", int(whole), max(int(part * 1e6), 1))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        own.setsockopt(socket.SOL_SOCKET, option, limit)

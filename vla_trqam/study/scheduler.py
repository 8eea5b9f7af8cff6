"""Runs a study's steps side by side, each a process of its own, and goes on after any end of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import torch

from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.engine.folder.run_lock import at_work
from vla_trqam.study.plan import Step

LOGS = "logs"
TICK = 0.2
"""Seconds between looks at the processes."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_PR_SET_PDEATHSIG = 1


@dataclass
class Standing:
    """How far a study is.

    Attributes:
        steps: all of them.
        done: names of those finished.
        running: those under way, by name.
        failed: why, by name, in a sentence.
        left_out: names of those that need a failed one.
    """

    steps: Sequence[Step]
    done: set[str] = field(default_factory=set)
    running: dict[str, Step] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @property
    def waiting(self) -> list[Step]:
        """Those yet to be begun, in order."""
        begun = {*self.done, *self.running, *self.failed, *self.left_out}
        return [step for step in self.steps if step.name not in begun]


@dataclass(frozen=True)
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    log: BinaryIO
    log_start: int
    device: str | None


class StopRequest:
    """While open, signals to stop are counted instead of ending the program."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs itself for Ctrl-C, SIGTERM and a terminal that closes, but under nohup."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Scheduler:
    """Keeps so many steps going until none is left.

    Args:
        steps: each after those it needs.
        workers: steps side by side.
        logs: folder of a log file for each.
        devices: names of the GPUs, of which each step has the one that fewest others have.
        say: gets a sentence when a step fails.
        show: is told the standing at every look.
        tick: seconds between looks.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        workers: int,
        logs: Path,
        devices: Sequence[str] = (),
        say: Callable[[str], None] = print,
        show: Callable[[Standing], None] = lambda _: None,
        tick: float = TICK,
    ) -> None:
        self.standing = Standing(steps)
        self._workers, self._logs, self._tick = workers, logs, tick
        self._devices = devices
        self._say, self._show = say, show
        self._running: list[_Running] = []
        self._told: set[str] = set()
        self._waits = False

    def run(self) -> bool:
        """Works until all is done, failed or left out; False when it was asked to stop before.

        A run at which another process is still at work is waited for, as one that this program's
        own sudden end left to finish its update and save. A first signal asks every process to save
        and end, each further one to end at once.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        stop, passed_on = StopRequest(), 0
        with stop.listening():
            try:
                while True:
                    self._reap(asked=stop.count > 0)
                    if stop.count > passed_on:
                        passed_on = stop.count
                        self._signal(signal.SIGINT if passed_on < 3 else signal.SIGKILL)
                    if not stop.count:
                        self._begin()
                    self._show(self.standing)
                    if not self._running and (stop.count or not self._waits):
                        return not stop.count
                    time.sleep(self._tick)
            finally:
                self._signal(signal.SIGKILL)  # of an exception of our own; else none is left

    def _begin(self) -> None:
        """Starts what is ready; a run that another process has takes a worker's place too."""
        self._waits = False
        ready = list(self._ready())
        taken = [step.name for step in ready if self._is_taken(step)]
        free = max(0, self._workers - len(self._running) - len(taken))
        for step in [one for one in ready if one.name not in taken][:free]:
            self._start(step)

    def _ready(self) -> Iterator[Step]:
        """Of those that wait; what is done or cannot be made is told apart."""
        for step in self.standing.waiting:
            if step.done.exists():
                self.standing.done.add(step.name)
            elif {*self.standing.failed, *self.standing.left_out} & set(step.needs):
                self.standing.left_out.add(step.name)
            elif set(step.needs) <= self.standing.done:
                yield step

    def _is_taken(self, step: Step) -> bool:
        """Whether another process has it, which is told once."""
        if not at_work(step.folder):
            return False
        self._waits = True
        if step.name not in self._told:
            self._told.add(step.name)
            self._say(f"{step.name} waits: another process is at work in {step.folder}")
        return True

    def _start(self, step: Step) -> None:
        begun = step.resume is not None and (step.folder / CONFIG_NAME).is_file()
        command = step.resume if begun and step.resume is not None else step.command
        step.folder.parent.mkdir(parents=True, exist_ok=True)
        log = log_path(self._logs, step).open("ab")
        start = log.tell()
        device = self._freest_device()
        chosen = {} if device is None else {VISIBLE: device}
        # A session of its own: the terminal's Ctrl-C is ours to pass on, once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | chosen,
            start_new_session=True,
            preexec_fn=_ends_with_parent,
        )
        self._running.append(_Running(step, process, log, start, device))
        self.standing.running[step.name] = step

    def _freest_device(self) -> str | None:
        taken = [one.device for one in self._running]
        return min(self._devices, key=taken.count, default=None)

    def _reap(self, *, asked: bool) -> None:
        for running in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(running)
            running.log.close()
            step, status = running.step, running.process.returncode
            del self.standing.running[step.name]
            if status == 0 and step.done.exists():
                self.standing.done.add(step.name)
            elif not asked:
                path = log_path(self._logs, step)
                sentence = why(path, status, running.log_start)
                self.standing.failed[step.name] = sentence
                self._say(f"{step.name} failed: {sentence} ({path})")

    def _signal(self, number: signal.Signals) -> None:
        for running in self._running:
            if running.process.poll() is None:
                if number == signal.SIGKILL:
                    os.killpg(running.process.pid, number)
                else:
                    running.process.send_signal(number)


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them, or all of the machine's."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return tuple(map(str, range(torch.cuda.device_count())))


def log_path(logs: Path, step: Step) -> Path:
    """Where a step's output goes."""
    return logs / f"{step.name.replace('/', '_')}.log"


def why(log: Path, status: int, start: int = 0) -> str:
    """The sentence in which a process told why it ended, or what is known without one.

    Args:
        log: its output, after that of earlier attempts.
        status: it ended with.
        start: byte of the log at which its own output begins.
    """
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    last = lines[-1] if lines else "it printed nothing"
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    return f"it ended with status {status}: {last}"


def _ends_with_parent() -> None:
    """Linux asks the process to stop when this one is killed, so that it leaves no orphan.

    What runs in the background of a shell ignores Ctrl-C, and so would its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT))

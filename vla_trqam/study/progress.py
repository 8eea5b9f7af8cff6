"""What the person at the terminal sees of a study: one line, with what matters of each run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.jobs.states import PRETRAIN
from vla_trqam.report.progress import status_text
from vla_trqam.study.plan import Step
from vla_trqam.study.scheduler import Standing

TAIL = 1 << 16
"""Bytes at a log's end, in which the newest numbers are."""
LINE_INTERVAL, BAR_INTERVAL = 60.0, 2.0
UNIT = 500
"""What a step costs beside its updates, in updates: starting, evaluating, drawing."""


class StudyProgress:
    """Shows a standing now and then: in place on a terminal, else a line a minute.

    Args:
        stream: where to write; standard error unless given.
        clock: seconds, for tests.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._start = clock, clock()
        self._terminal = self._stream.isatty()
        self._interval = BAR_INTERVAL if self._terminal else LINE_INTERVAL
        self._last = self._start - self._interval
        self._first: float | None = None

    def show(self, standing: Standing) -> None:
        """The standing, if it is time."""
        now = self._clock()
        if now - self._last < self._interval:
            return
        self._last = now
        left = self._seconds_left(standing, now)
        line = line_of(standing, left)
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def say(self, sentence: str) -> None:
        """A sentence of its own, which stays."""
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{sentence}", file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._terminal:
            print(file=self._stream)

    def _seconds_left(self, standing: Standing, now: float) -> float | None:
        """By the work done since the first look; None before there is any."""
        done, left = work(standing)
        if self._first is None:
            self._first = done
        gained = done - self._first
        return None if gained <= 0 else (now - self._start) * left / gained


def line_of(standing: Standing, seconds_left: float | None) -> str:
    """12/45 steps done, 1 failed | lift/trqam_s0 offline 3000/6000, success 45% | 1:20 h left."""
    count = f"{len(standing.done)}/{len(standing.steps)} steps done"
    for names, word in ((standing.failed, "failed"), (standing.left_out, "left out")):
        count += f", {len(names)} {word}" if names else ""
    parts = [count, *(step_status(step) for step in standing.running.values())]
    if seconds_left is not None:
        hours, minutes = divmod(round(seconds_left / 60), 60)
        parts.append(f"{hours}:{minutes:02d} h left")
    return " | ".join(parts)


def work(standing: Standing) -> tuple[float, float]:
    """Done and to be done, in updates."""
    done = left = 0.0
    for step in standing.steps:
        whole = step.updates + UNIT
        made = whole if step.name in standing.done else 0
        if step.name in standing.running:
            count, phase, _ = newest(step.folder)
            made = count if phase in step.phases else 0
        gone = step.name in standing.failed or step.name in standing.left_out
        done += made
        left += 0 if gone else whole - made
    return done, left


def step_status(step: Step) -> str:
    """A running step's name, phase, update and newest numbers."""
    made, phase, values = newest(step.folder)
    if phase in step.phases:
        head = f"{step.name} {phase} {made}/{step.updates}"
    elif phase and phase != PRETRAIN:
        head = f"{step.name} {phase} {made}"
    else:
        return f"{step.name} begins"  # its log may begin with that of its base
    return ", ".join(part for part in (head, status_text(values)) if part)


def newest(folder: Path) -> tuple[int, str, dict[str, float]]:
    """Updates, phase and last numbers of a run, by the end of its log; 0 and nothing before."""
    path = folder / METRICS_NAME
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            lines = file.read().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return 0, "", {}
    step, phase, values = 0, "", dict[str, float]()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first may be cut
        step = int(record.pop("step"))
        name = str(record.pop("phase"))
        phase = phase if name == "eval" else name
        values |= {key: float(value) for key, value in record.items()}
    return step, phase, values

"""What the person at the terminal sees while training: a bar, or a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn, Self, TextIO

from tqdm import tqdm


class TrainingProgress:
    """Progress of one phase: success, KL against its budget, λ, Q, updates per second.

    On a terminal this is a tqdm bar. Elsewhere (a log file, a CI run) a bar would fill the file
    with control characters, so a plain line is printed about every `line_interval` seconds, and at
    the phase's end.

    Args:
        total: Updates of the phase.
        phase: Its name, shown in front.
        initial: Updates already done (a resumed run).
        stream: Where to write; standard error unless given.
        line_interval: Seconds between lines where the stream is not a terminal.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        phase: str,
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        line_interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.phase, self.done = total, phase, initial
        self._stream = sys.stderr if stream is None else stream
        self._interval, self._clock = line_interval, clock
        self._values: dict[str, float] = {}
        self._start = self._last_line = clock()
        self._initial = self._printed = initial
        self._bar = self._open_bar() if self._stream.isatty() else None

    def _open_bar(self) -> "tqdm[NoReturn]":
        return tqdm(
            total=self.total,
            initial=self.done,
            desc=self.phase,
            unit=" updates",
            file=self._stream,
            dynamic_ncols=True,
        )

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Show that `done` updates of the phase are made, and the newest `values`.

        Values given earlier stay on display until they are given anew: an evaluation's success rate
        is there between evaluations.
        """
        self._values |= values
        advance, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(status_text(self._values), refresh=False)
            self._bar.update(advance)
        elif self._clock() - self._last_line >= self._interval:
            self._print_line()

    def write(self, message: str) -> None:
        """Print a message of its own above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the last state and end the display."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed != self.done:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._printed = self._clock(), self.done
        seconds = max(self._last_line - self._start, 1e-9)
        rate = (self.done - self._initial) / seconds
        percent = 100 * self.done / max(self.total, 1)
        parts = [
            f"{self.phase}: {self.done}/{self.total} ({percent:.0f}%)",
            f"{rate:.1f} updates/s",
        ]
        status = status_text(self._values)
        print(", ".join([*parts, status] if status else parts), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def status_text(values: Mapping[str, float]) -> str:
    """The numbers worth watching, as far as `values` (named as in `metrics.jsonl`) has them."""
    parts = []
    if "success_rate" in values:
        parts.append(f"success {values['success_rate']:.0%}")
    kl = values.get("kl_ema", values.get("kl_estimate"))
    if kl is not None:
        budget = f"/{values['kl_budget']:.3g}" if "kl_budget" in values else ""
        parts.append(f"KL {kl:.3g}{budget}")
    if "lam" in values:
        parts.append(f"λ {values['lam']:.3g}")
    if "q_mean" in values:
        parts.append(f"Q {values['q_mean']:.4g}")
    if "bc_loss" in values and kl is None:
        parts.append(f"BC loss {values['bc_loss']:.4g}")
    return ", ".join(parts)

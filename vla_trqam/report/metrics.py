"""The run's record: `metrics.jsonl`, one JSON object a line, and the progress shown meanwhile.

A line is `{"step": updates so far, "phase": ..., "time": seconds since the run began, name: value,
...}`. Every line is flushed as it is written, so a killed run loses at most the line in the making,
and a resumed run drops what lies beyond its checkpoint and goes on as if never interrupted.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from vla_trqam.errors import UserError
from vla_trqam.report.tracker import Tracker

RESERVED_NAMES = frozenset({"step", "phase", "time"})
TRAINING_PHASES = ("offline", "online")

# JSON knows no NaN or infinity. As strings they keep the line valid and tell a diverged run apart
# from one that did not log the number; float() reads all three back.
NON_FINITE = frozenset({"NaN", "Infinity", "-Infinity"})


@dataclass(frozen=True, eq=False)
class MetricSeries:
    """One metric over time: M lines that carry it.

    Attributes:
        step: (M,) int64, updates so far.
        time: (M,) float64, seconds since the run began.
        value: (M,) float64; NaN or infinite where the run logged such a number.
    """

    step: NDArray[np.int64]
    time: NDArray[np.float64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)


Metrics = Mapping[str, Mapping[str, MetricSeries]]


class MetricsLog:
    """Appends to `metrics.jsonl`, flushing every line.

    `MetricsLog(path)` begins a new file. After an interruption, `resume_after_line`, with the
    `num_lines` that the checkpoint recorded, drops what the lost updates wrote.

    Attributes:
        path: the file.
        num_lines: lines in it.
        tracker: gets every line as well; None for none.

    Raises:
        UserError: When the file exists already (a new log), or does not reach as far as the
            checkpoint (a resumed one).
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            path.open("xb").close()
        except FileExistsError:
            raise UserError(f"{path} exists: resume that run or choose another folder") from None
        self._begin(path, num_lines=0, elapsed=0.0, clock=clock)

    @staticmethod
    def _kept(path: Path, num_lines: int) -> list[bytes]:
        lines = _complete_lines(path)
        if len(lines) < num_lines:
            raise UserError(
                f"{path} has {len(lines)} complete lines, but the checkpoint was saved after"
                f" {num_lines}: the file was cut or belongs to another run"
            )
        return lines[:num_lines]

    @classmethod
    def resume_after_line(
        cls, path: Path, num_lines: int, *, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """Go on after the first `num_lines` lines; what was logged beyond is dropped."""
        kept = cls._kept(path, num_lines)
        elapsed = float(_parse_line(path, len(kept), kept[-1])["time"]) if kept else 0.0
        os.truncate(path, _size(kept))
        log = cls.__new__(cls)
        log._begin(path, num_lines=len(kept), elapsed=elapsed, clock=clock)
        return log

    def _begin(
        self, path: Path, *, num_lines: int, elapsed: float, clock: Callable[[], float]
    ) -> None:
        self.path = path
        self.num_lines = num_lines
        self._clock = clock
        self._start = clock() - elapsed
        self.tracker: Tracker | None = None
        self._file = path.open("ab")

    def log(self, step: int, phase: str, values: Mapping[str, SupportsFloat]) -> None:
        """Write one line.

        Args:
            step: Updates so far.
            phase: "pretrain", "critic", "offline", "online" or "eval".
            values: Numbers by name. Integers stay integers. A NaN or an infinity is written as the
                string "NaN", "Infinity" or "-Infinity".

        Raises:
            ValueError: For a name that every line carries anyway.
        """
        taken = RESERVED_NAMES & values.keys()
        if taken:
            raise ValueError(f"the names {sorted(taken)} are taken: every line carries them")
        elapsed = round(self._clock() - self._start, 3)
        record = {"step": int(step), "phase": phase, "time": elapsed}
        record |= {name: json_number(value) for name, value in values.items()}
        # One write for text and newline: a line without its newline is known to be half-written.
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.num_lines += 1
        if self.tracker is not None:
            self.tracker.log(self.num_lines, step, phase, values)

    def sync(self) -> None:
        """Wait until the disk itself has every line: survives a power cut, not just a kill."""
        os.fsync(self._file.fileno())

    def cut_back(self, num_lines: int) -> None:
        """Go on after the first `num_lines` lines, as a resumed run; the clock runs on."""
        kept = self._kept(self.path, num_lines)
        os.truncate(self.path, _size(kept))  # the file is open for appending: at its new end
        self.num_lines = num_lines

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines written so far, as they can be read back."""
        return _records(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> dict[str, dict[str, MetricSeries]]:
    """Read `metrics.jsonl`, leaving out a half-written last line.

    Returns:
        Series by phase and name. Only the lines that carry a name are in its series.

    Raises:
        UserError: When the file is missing, or a line before the last is not what this module
            writes.
    """
    rows: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for record in _records(path):
        step, phase, seconds = record.pop("step"), record.pop("phase"), record.pop("time")
        for name, value in record.items():
            series = rows.setdefault(phase, {}).setdefault(name, [])
            series.append((step, seconds, float(value)))
    return {
        phase: {name: _series(points) for name, points in by_name.items()}
        for phase, by_name in rows.items()
    }


def join_phases(
    metrics: Metrics, name: str, phases: tuple[str, ...] = TRAINING_PHASES
) -> MetricSeries:
    """The series of `name` over several phases, one after the other; empty if none logged it."""
    found = [metrics[phase][name] for phase in phases if name in metrics.get(phase, {})]
    if not found:
        return _series([])
    return MetricSeries(
        step=np.concatenate([series.step for series in found]),
        time=np.concatenate([series.time for series in found]),
        value=np.concatenate([series.value for series in found]),
    )


@dataclass(frozen=True)
class TrustRegionSummary:
    """How well the KL followed its budget over the last half of training.

    Attributes:
        kl_budget: Last budget, in the unit of the KL.
        kl_ema_mean: Mean of the KL's moving average, which is of estimates clipped at twice the
            budget (`kl_clip`).
        kl_mean: Mean of the estimates themselves; of the average where they were not logged.
        worst_relative_error: Largest |EMA - budget| / budget where λ sits on no bound; NaN if it
            always does.
        share_within: Share of logged lines with the EMA within `tolerance` of the budget.
        share_on_lower_bound: Share of logged lines with λ on its lower bound.
        share_on_upper_bound: Share of logged lines with λ on its upper bound.
        lam_final: Last λ.
        tolerance: Relative error that counts as following the budget.
        held: Whether every line is within the tolerance or has λ on a bound.
    """

    kl_budget: float
    kl_ema_mean: float
    kl_mean: float
    worst_relative_error: float
    share_within: float
    share_on_lower_bound: float
    share_on_upper_bound: float
    lam_final: float
    tolerance: float
    held: bool


def summarise_trust_region(metrics: Metrics, tolerance: float = 0.2) -> TrustRegionSummary | None:
    """Compare the KL's moving average with its budget over the last half of training.

    A relative error up to the tolerance counts as following it.

    Returns:
        The summary; None when the run logged no `kl_ema` or no `kl_budget` (no trust region).

    Raises:
        UserError: When `kl_ema`, `kl_budget` and `lam` were not logged on the same lines.
    """
    if any(len(join_phases(metrics, name)) == 0 for name in ("kl_ema", "kl_budget")):
        return None
    ema, budget, lam = _last_half(metrics, "kl_ema", "kl_budget", "lam")
    on_lower = _on_bound(metrics, lam, "lam_min")
    on_upper = _on_bound(metrics, lam, "lam_max")
    logged = len(join_phases(metrics, "kl_estimate")) > 0
    (estimates,) = _last_half(metrics, "kl_estimate") if logged else (ema,)
    error = np.abs(ema - budget) / budget
    free = ~(on_lower | on_upper)
    within = error <= tolerance
    return TrustRegionSummary(
        kl_budget=float(budget[-1]),
        kl_ema_mean=float(ema.mean()),
        kl_mean=float(estimates.mean()),
        worst_relative_error=float(error[free].max()) if free.any() else math.nan,
        share_within=float(within.mean()),
        share_on_lower_bound=float(on_lower.mean()),
        share_on_upper_bound=float(on_upper.mean()),
        lam_final=float(lam[-1]),
        tolerance=tolerance,
        held=bool((within | ~free).all()),
    )


def on_same_lines(metrics: Metrics, *names: str) -> list[MetricSeries]:
    """Series of the training phases that were logged together.

    Raises:
        UserError: When one of them was logged at other steps than the first.
    """
    series = [join_phases(metrics, name) for name in names]
    for name, other in zip(names, series, strict=True):
        if not np.array_equal(other.step, series[0].step):
            raise UserError(f"{name} and {names[0]} must be logged on the same lines")
    return series


def _last_half(metrics: Metrics, *names: str) -> list[NDArray[np.float64]]:
    """Values over the last half of the steps."""
    series = on_same_lines(metrics, *names)
    step = series[0].step
    late = step >= (step[0] + step[-1]) / 2
    return [each.value[late] for each in series]


def _on_bound(metrics: Metrics, lam: NDArray[np.float64], name: str) -> NDArray[np.bool_]:
    """Whether λ sits on the bound `name`; nowhere when the run has no such bound."""
    if len(join_phases(metrics, name)) == 0:
        return np.zeros(len(lam), dtype=bool)
    (bound,) = _last_half(metrics, name)
    return np.isclose(lam, bound, rtol=1e-6, atol=0.0)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_complete_lines(path), 1):
        yield _parse_line(path, number, line)


def _complete_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline; what follows the last newline is half-written."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it is where a run writes its metrics") from None


def _size(lines: list[bytes]) -> int:
    return sum(len(line) + 1 for line in lines)


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        int(record["step"]), str(record["phase"]), float(record["time"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} line {number} is not a line of metrics"
            ' ({"step": ..., "phase": ..., "time": ..., name: number})'
        ) from error
    for name, value in record.items():
        if name != "phase" and not isinstance(value, int | float) and value not in NON_FINITE:
            raise UserError(f"{path} line {number}: {name} is {value!r}, not a number")
    return dict(record)


def json_number(value: SupportsFloat) -> int | float | str:
    """What stands for a number in JSON: itself, or a string where JSON has no such number."""
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def _series(points: list[tuple[int, float, float]]) -> MetricSeries:
    return MetricSeries(
        step=np.array([point[0] for point in points], dtype=np.int64),
        time=np.array([point[1] for point in points], dtype=np.float64),
        value=np.array([point[2] for point in points], dtype=np.float64),
    )

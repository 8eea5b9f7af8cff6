"""Run folders as the claims read them: finished ones, and those that ended by diverging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import Source
from numpy.typing import NDArray
from run_results.finished_run import read_run

from vla_trqam.config.parsing import read_settings
from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.errors import UserError
from vla_trqam.report.metrics import (
    TRAINING_PHASES,
    Metrics,
    join_phases,
    json_number,
    read_metrics,
)
from vla_trqam.report.page import write_json

REPORT, CONFIG, LINES = "report.json", "config.yaml", "metrics.jsonl"
TENTH = 1 / 10


@dataclass(frozen=True, eq=False)
class ClaimRun:
    """A run that came to its end.

    Attributes:
        folder: where it lies.
        title: of its report; empty where it has none.
        config: its settings.
        metrics: what it logged.
        base: success of its base on the final initial states; None where it diverged.
        tuned: of what it made of it; None where it diverged.
        provenance: command, commit, versions, machine; empty where it diverged.
    """

    folder: Path
    title: str
    config: Mapping[str, Any]
    metrics: Metrics
    base: float | None = None
    tuned: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What makes its numbers traceable: settings, seed, commit and both rates."""
        told = {k: v for k, v in self.provenance.items() if k in ("command", "commit")}
        rates = {"base": self.base, "tuned": self.tuned, "worst": json_number(self.worst)}
        return {"run": self.folder.name, "seed": self.seed, **rates, **told}

    @property
    def diverged(self) -> bool:
        """Whether it ended by numbers that are not finite."""
        return self.tuned is None

    @property
    def gain(self) -> float | None:
        """Success won, from -1 to 1; None where it diverged."""
        return None if self.tuned is None or self.base is None else self.tuned - self.base

    @property
    def method(self) -> Mapping[str, Any]:
        """The method's knobs, and its name as ``type``."""
        knobs: Mapping[str, Any] = self.config["method"]
        return knobs

    @property
    def seed(self) -> int:
        """Of its training."""
        return int(self.config["seed"])

    def values(self, name: str, phases: tuple[str, ...] = TRAINING_PHASES) -> NDArray[np.float64]:
        """What it logged of a metric; empty where it logged none."""
        return join_phases(self.metrics, name, phases).value

    def tenth(self, name: str, where: float) -> float:
        """Median over a tenth of a metric's lines.

        Args:
            name: of the metric.
            where: 0 for the first tenth, 0.5 for the one in the middle, 1 for the last.

        Returns:
            NaN without any lines.
        """
        values = self.values(name)
        if not len(values):
            return np.nan
        few = max(round(len(values) * TENTH), 1)
        begin = round(where * (len(values) - few))
        return float(np.median(values[begin : begin + few]))

    @property
    def worst(self) -> float:
        """Least success of its evaluations during training; NaN where there were none."""
        rates = self.values("success_rate", ("eval",))[1:]
        return float(rates.min()) if len(rates) else np.nan


def read_claim_run(folder: Path) -> ClaimRun:
    """A run's folder; one that only makes a base has neither of its two rates.

    Raises:
        UserError: it is no run's folder, its run has not come to its end, or a file is damaged.
    """
    if (folder / REPORT).is_file():
        done = read_run(folder)
        rates = done.evaluation.base_rate, done.evaluation.tuned_rate
        return ClaimRun(folder, done.title, done.config, done.metrics, *rates, done.provenance)
    if not (folder / CONFIG).is_file() or not (folder / LINES).is_file():
        raise UserError(
            f"{folder} is no run's folder: it has no {REPORT}, and not both of {CONFIG} and {LINES}"
        )
    config = read_settings(folder / CONFIG)
    if config["steps"] and not (folder / DIVERGED_NAME).is_file():
        raise UserError(
            f"the run in {folder} neither finished nor diverged: go on with it, or leave it out"
        )
    return ClaimRun(folder, "", config, read_metrics(folder / LINES))


def read_claim_runs(folders: Iterable[Path]) -> list[ClaimRun]:
    """Several, without those that only make a base.

    Raises:
        UserError: one is given twice; or see :func:`read_claim_run`.
    """
    found = sorted(folders)
    twice = [str(a) for a, b in pairwise(found) if a == b]
    if twice:
        raise UserError(f"the run {twice[0]} is given twice")
    return [run for run in map(read_claim_run, found) if run.config["steps"]]


def from_runs[T](take: Callable[[Sequence[ClaimRun]], Sequence[T]]) -> Source[T]:
    """A claim's runs, of each of which a reader keeps command and rates.

    Args:
        take: what the runs are to the claim.
    """

    def read(folders: Sequence[Path]) -> Sequence[T]:
        return take(read_claim_runs(folders))

    def record(folders: Sequence[Path], to: Path) -> str:
        write_json(to, {"runs": [run.record for run in read_claim_runs(folders)]})
        return f"recorded {to}"

    return Source(
        "--runs",
        "folders of runs",
        read,
        "--record",
        "JSON file for each run's command and rates",
        record,
    )


def grouped(runs: Sequence[ClaimRun], key: Callable[[ClaimRun], Any]) -> dict[Any, list[ClaimRun]]:
    """Runs by what they have in common, in the order of the first of each."""
    groups: dict[Any, list[ClaimRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def mean_and_spread(values: Sequence[float]) -> str:
    """``0.931 -> 93 ± 4``: percent, with the standard deviation over seeds where there are two."""
    if not values:
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.0f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.0f}{spread}"

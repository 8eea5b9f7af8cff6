"""Finished runs of `recipes/finetune_robomimic.py`, read back for a page of results."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_trqam.config.parsing import read_settings
from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.metrics import (
    TRAINING_PHASES,
    Metrics,
    join_phases,
    json_number,
    read_metrics,
)

# What a metric is at first and at last is told by this share of its logged lines: one is one batch.
END_SHARE = 1 / 10
MOST_POINTS = 150
# Settings that may differ between runs without making them other experiments.
INCIDENTAL = frozenset(
    {
        *("output_dir", "resume", "seed", "num_threads", "kernels", "on_divergence"),
        *("eval.num_workers", "eval.chunk_deadline"),
    }
)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a finished run left, without the paths of the machine that it ran on.

    Attributes:
        folder: where it lies.
        title: what was run, for instance "TRQAM on Lift".
        config: every setting.
        evaluation: base and tuned policy on the same initial states.
        metrics: `metrics.jsonl`.
        wall_clock: seconds by phase.
        provenance: command, seeds, commit, versions, machine.
        date: UTC day on which its evaluation was written.
        base_weights: SHA-256 of the base policy's weights; runs from one base share it. None for a
            run that keeps no copy of its base: its settings name it.
    """

    folder: Path
    title: str
    config: dict[str, Any]
    evaluation: PairedEvaluation
    metrics: Metrics
    wall_clock: dict[str, float]
    provenance: dict[str, Any]
    date: str
    base_weights: str | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def metrics_path(self) -> Path:
        """Its `metrics.jsonl`."""
        return self.folder / "metrics.jsonl"

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.config["seed"])

    @property
    def flow_steps(self) -> FlowSteps | None:
        """Of its base as it came and of its tuned policy; None where the numbers are one."""
        came = self.evaluation.as_it_came
        return None if came is None else came.flow_steps

    @property
    def rate_as_it_came(self) -> float | None:
        """Success of the base with its own number of flow steps; None where all have that."""
        came = self.evaluation.as_it_came
        return None if came is None else float(came.success.mean())

    @property
    def kl_unit(self) -> str:
        """Unit of its KL and budget."""
        return "nats per action" if self.config["method"].get("kl_per_action") else "nats per chunk"

    def values(self, name: str, phases: tuple[str, ...] = TRAINING_PHASES) -> NDArray[np.float64]:
        """The logged values of a metric.

        Raises:
            UserError: the run did not log it.
        """
        values = join_phases(self.metrics, name, phases).value
        if len(values) == 0:
            raise UserError(f"{self.folder} logged no {name} in the phases {', '.join(phases)}")
        return values

    def first(self, name: str) -> NDArray[np.float64]:
        """A metric's values in the first tenth of its lines."""
        values = self.values(name)
        return values[: end_size(len(values))]

    def last(self, name: str) -> NDArray[np.float64]:
        """A metric's values in the last tenth of its lines."""
        values = self.values(name)
        return values[-end_size(len(values)) :]

    def raw(self) -> dict[str, Any]:
        """Its numbers for a JSON file: outcomes of every episode, thinned metrics, settings."""
        return {
            "run": self.name,
            "title": self.title,
            "date": self.date,
            "evaluation": self.evaluation.to_json(),
            "wall_clock_seconds": self.wall_clock,
            "provenance": self.provenance,
            "base_weights_sha256": self.base_weights,
            "config": self.config,
            "metrics": thinned(self.metrics),
        }


def read_run(folder: Path) -> FinishedRun:
    """Reads a run's folder.

    Raises:
        UserError: the folder is not a finished run, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the --output_dir of a finished run")
    report = _read_object(folder, "report.json", "title", "wall_clock_seconds", "provenance")
    evaluation = _read_object(folder, "evaluation.json")
    base = folder / "base_policy"
    written = datetime.fromtimestamp((folder / "evaluation.json").stat().st_mtime, UTC)
    return FinishedRun(
        folder=folder,
        title=str(report["title"]),
        config=without_machine_paths(_read_config(folder / "config.yaml")),
        evaluation=PairedEvaluation.from_json(evaluation),
        metrics=read_metrics(folder / "metrics.jsonl"),
        wall_clock={phase: float(s) for phase, s in report["wall_clock_seconds"].items()},
        provenance=_shareable_provenance(report["provenance"]),
        date=written.date().isoformat(),
        base_weights=_digest(base / "model.safetensors") if base.is_dir() else None,
    )


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Reads several runs.

    Raises:
        UserError: a run is given twice, or two have one name: their files would overwrite.
    """
    names = [folder.resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the run {twice[0]} is given twice; every run needs a name of its own")
    return [read_run(folder) for folder in folders]


def without_machine_paths(value: Any) -> Any:
    """`value` with every absolute path in it cut to what another machine has too."""
    if isinstance(value, Mapping):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(item) for item in value]
    return _relative(value) if isinstance(value, str) else value


def shareable_command(command: str) -> str:
    """A command line without machine paths; those after `--flag=` included."""
    return shlex.join(_shareable_word(word) for word in shlex.split(command))


def differing_settings(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Settings in which the runs differ, with their distinct values; seeds and folders aside."""
    flat = [_flatten(run.config) for run in runs]
    names = sorted({name for config in flat for name in config} - INCIDENTAL)
    values = {name: [json.dumps(config.get(name)) for config in flat] for name in names}
    return {name: list(dict.fromkeys(v)) for name, v in values.items() if len(set(v)) > 1}


def thinned(metrics: Metrics) -> dict[str, Any]:
    """At most 150 evenly spaced points of every metric (all of the evaluations), five digits."""
    return {
        phase: {name: _thin(series.step, series.value) for name, series in by_name.items()}
        for phase, by_name in metrics.items()
    }


def end_size(lines: int) -> int:
    """How many of so many lines are the first or the last tenth."""
    return max(round(lines * END_SHARE), 1)


def _thin(step: NDArray[np.int64], value: NDArray[np.float64]) -> dict[str, list[Any]]:
    kept = np.unique(np.linspace(0, len(step) - 1, min(len(step), MOST_POINTS)).round().astype(int))
    numbers = [json_number(float(f"{number:.5g}")) for number in value[kept]]
    return {"step": step[kept].tolist(), "value": numbers}


def _shareable_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in provenance.items() if key != "command"}
    return {"command": shareable_command(provenance["command"]), **without_machine_paths(rest)}


def _shareable_word(word: str) -> str:
    # --flag=PATH, and LABEL=PATH,PATH of this folder's own commands
    return "".join(_relative(part) for part in re.split("([=,])", word))


def _relative(text: str) -> str:
    path = Path(text)
    if not path.is_absolute():
        return text
    # A script keeps its place in the repository.
    for folder in ("recipes", "benchmarks"):
        if folder in path.parts and path.suffix == ".py":
            return Path(*path.parts[path.parts.index(folder) :]).as_posix()
    return path.name


def _read_object(folder: Path, name: str, *keys: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} does not exist: {folder} is no run, or it did not finish")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing or not isinstance(value, dict):
        raise UserError(f"{path} lacks {', '.join(missing) or 'an object'}; the recipe writes it")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    config = read_settings(path)
    if not {"seed", "method"} <= config.keys():
        raise UserError(f"{path} does not hold the settings of a run: seed or method is missing")
    return config


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat

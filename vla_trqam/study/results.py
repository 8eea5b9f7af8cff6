"""What the runs of a study left, as numbers by task, variant and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_trqam.config.state_settings import StateRunConfig
from vla_trqam.engine.conclude import EVALUATION_NAME
from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.metrics import (
    Metrics,
    TrustRegionSummary,
    join_phases,
    read_metrics,
    summarise_trust_region,
)
from vla_trqam.study.plan import StudyRun

ROLLED_OUT = ("critic", "offline", "online")


@dataclass(frozen=True, eq=False)
class Curve:
    """A run's evaluations, E of them.

    Attributes:
        updates: (E,) of the policy.
        env_steps: (E,) control steps rolled out for training before.
        rate: (E,) success.
        episodes: (E,) initial states.
    """

    updates: NDArray[np.int64]
    env_steps: NDArray[np.int64]
    rate: NDArray[np.float64]
    episodes: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Attributes:
        task: its name in the study.
        label: of what is compared.
        seed: of the training.
        folder: where it lies.
        evaluation: base and tuned policy at the end, on the final initial states.
        curve: the evaluations during training.
        num_updates: of the policy, in all.
        offline: success right after the offline updates.
        updates_per_s: of the offline updates, or of the online ones where there are no others.
        env_steps: rolled out for training.
        trust_region: how the KL followed its budget; None for a method without one.
        kl_unit: of the KL.
        metrics: of the run.
    """

    task: str
    label: str
    seed: int
    folder: Path
    evaluation: PairedEvaluation
    curve: Curve
    num_updates: int
    offline: float
    updates_per_s: float
    env_steps: int
    trust_region: TrustRegionSummary | None
    kl_unit: str
    metrics: Metrics

    @property
    def metrics_path(self) -> Path:
        """Its log."""
        return self.folder / METRICS_NAME

    @property
    def base(self) -> float:
        """Success of the base."""
        return self.evaluation.base_rate

    @property
    def final(self) -> float:
        """Success at the end."""
        return self.evaluation.tuned_rate

    @property
    def curve_to_end(self) -> Curve:
        """The evaluations during training, and the final one, on other and more initial states."""
        curve, before = self.curve, self.curve.updates < self.num_updates

        def ended(values: NDArray[Any], last: float) -> NDArray[Any]:
            return np.append(values[before], np.asarray(last, dtype=values.dtype))

        return Curve(
            ended(curve.updates, self.num_updates),
            ended(curve.env_steps, self.env_steps),
            ended(curve.rate, self.final),
            ended(curve.episodes, len(self.evaluation)),
        )

    def row(self) -> dict[str, Any]:
        """Its numbers, one a column."""
        return {
            "task": self.task,
            "method": self.label,
            "seed": self.seed,
            "base": self.base,
            "after_offline": self.offline,
            "after_online": self.final,
            "env_steps": self.env_steps,
            "updates_per_s": self.updates_per_s,
            "final_episodes": len(self.evaluation),
            "training_episodes": int(self.curve.episodes[-1]),
        }


def read_results(runs: Sequence[StudyRun]) -> list[Result]:
    """Of the runs that are finished."""
    return [read_result(run) for run in runs if run.step.done.exists()]


def read_result(run: StudyRun) -> Result:
    """Reads a run's folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    metrics = read_metrics(run.folder / METRICS_NAME)
    curve = learning_curve(metrics, str(run.folder))
    path = run.folder / EVALUATION_NAME
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    evaluation = PairedEvaluation.from_json(content)
    per_action = getattr(run.config.method, "kl_per_action", False)
    return Result(
        task=run.task,
        label=run.label,
        seed=run.seed,
        folder=run.folder,
        evaluation=evaluation,
        curve=curve,
        num_updates=run.config.steps + run.config.online.steps,
        offline=after_offline(curve, evaluation, run.config),
        updates_per_s=_updates_per_s(metrics),
        env_steps=int(sum(series.value.sum() for _, series in _episode_steps(metrics))),
        trust_region=summarise_trust_region(metrics),
        kl_unit="nats per action" if per_action else "nats per chunk",
        metrics=metrics,
    )


def learning_curve(metrics: Metrics, where: str) -> Curve:
    """The evaluations during training, and what was rolled out before each.

    Raises:
        UserError: there is none.
    """
    rates, counts = (join_phases(metrics, n, ("eval",)) for n in ("success_rate", "episodes"))
    if not len(rates):
        raise UserError(f"{where} logged no evaluation during training")
    env_steps = np.zeros(len(rates), dtype=np.int64)
    for _, series in _episode_steps(metrics):
        # The log's clock tells which came first: both can be of one update.
        before = series.time[None, :] <= rates.time[:, None]
        env_steps += (before * series.value[None, :]).sum(axis=1).astype(np.int64)
    return Curve(rates.step, env_steps, rates.value, counts.value.astype(np.int64))


def after_offline(curve: Curve, evaluation: PairedEvaluation, config: StateRunConfig) -> float:
    """Success between the offline and the online updates; NaN for a run without offline ones.

    Without online updates that is the end.
    """
    if not config.online.steps:
        return evaluation.tuned_rate
    at = np.flatnonzero(curve.updates == config.steps)
    return float(curve.rate[at[0]]) if config.steps and len(at) else float("nan")


def _episode_steps(metrics: Metrics) -> list[tuple[str, Any]]:
    found: Mapping[str, Any] = {
        phase: metrics.get(phase, {}).get("episode_steps") for phase in ROLLED_OUT
    }
    return [(phase, series) for phase, series in found.items() if series is not None]


def _updates_per_s(metrics: Metrics) -> float:
    for phase in ("offline", "online"):
        series = metrics.get(phase, {}).get("updates_per_s")
        if series is not None:
            return float(series.value[-1])
    return float("nan")

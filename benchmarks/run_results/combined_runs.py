"""Training runs of one setting together: their rates, the pooled gain, their curves.

The interval of the pooled gain is a bootstrap over both training runs and initial states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vla_trqam.errors import UserError
from vla_trqam.report.comparison_plots import draw_runs, load_runs
from vla_trqam.report.evaluation import Interval, PairedEvaluation
from vla_trqam.report.figures import (
    color_of,
    draw_series,
    new_figure,
    required,
    save,
    use_log_axis,
)
from vla_trqam.report.formats import percent, points, points_interval, table
from vla_trqam.report.metrics import Metrics, join_phases, json_number
from vla_trqam.study.statistics import mean_interval


@dataclass(frozen=True, eq=False)
class CombinedEvaluation:
    """Several training runs (R of them) evaluated on the same initial states.

    Attributes:
        base_rates: (R,) success rate of each run's base policy.
        tuned_rates: (R,) success rate of each run's tuned policy.
        difference: Tuned minus base success rate, over all runs and initial states.
        difference_interval: Its bootstrap interval.
        seeds_interval: Student's over the runs alone; NaN of one.
        confidence: Coverage of the interval.
        replicates: Bootstrap replicates behind it.
    """

    base_rates: NDArray[np.float64]
    tuned_rates: NDArray[np.float64]
    difference: float
    difference_interval: Interval
    seeds_interval: Interval
    confidence: float
    replicates: int

    @property
    def median_tuned_rate(self) -> float:
        """Median over the training runs of the tuned success rate."""
        return float(np.median(self.tuned_rates))

    @property
    def worst_run(self) -> int:
        """Index of the training run whose tuned policy gained least on its base."""
        return int(np.argmin(self.tuned_rates - self.base_rates))

    @property
    def worst_difference(self) -> float:
        """The least gain of a training run; negative when a run fell below its base."""
        return float(np.min(self.tuned_rates - self.base_rates))

    def to_json(self) -> dict[str, Any]:
        """What `json.dump` takes."""
        return {
            "base_rates": self.base_rates.tolist(),
            "tuned_rates": self.tuned_rates.tolist(),
            "median_tuned_rate": self.median_tuned_rate,
            "worst_run": self.worst_run,
            "worst_difference": self.worst_difference,
            "difference": self.difference,
            "difference_interval": [self.difference_interval.low, self.difference_interval.high],
            "seeds_interval": [json_number(end) for end in astuple(self.seeds_interval)],
            "confidence": self.confidence,
            "bootstrap_replicates": self.replicates,
        }


def combine_seeds(
    evaluations: Sequence[PairedEvaluation],
    *,
    confidence: float = 0.95,
    replicates: int = 10_000,
    bootstrap_seed: int = 0,
) -> CombinedEvaluation:
    """Combine training runs that were evaluated on the same initial states.

    The interval is a bootstrap over training runs and over initial states (`pigeonhole_interval`):
    neither the N episodes of a run nor the R runs on a state are independent. Three runs drawn anew
    are still the same three, so what it says of other runs is too narrow: Student's interval over
    the runs stands beside it. A single run gives no more than its own states.

    Args:
        evaluations: R paired evaluations; the same seeds in the same order.
        confidence: Two-sided coverage, between 0 and 1.
        replicates: Bootstrap replicates.
        bootstrap_seed: Seed of the resampling, so that the interval can be reproduced.

    Returns:
        Rates of the runs, and the pooled difference with its interval.

    Raises:
        UserError: When there is no evaluation, or their initial states differ.
    """
    if not evaluations:
        raise UserError("there is no evaluation to combine; give at least one")
    for run, evaluation in enumerate(evaluations):
        if not np.array_equal(evaluation.seeds, evaluations[0].seeds):
            raise UserError(
                f"evaluation {run} was made on other initial states than evaluation 0: only"
                " evaluations on the same seeds, in the same order, can be combined"
            )
    gains = np.stack([e.tuned_success.astype(float) - e.base_success for e in evaluations])
    return CombinedEvaluation(
        base_rates=np.array([e.base_rate for e in evaluations]),
        tuned_rates=np.array([e.tuned_rate for e in evaluations]),
        difference=float(gains.mean()),
        difference_interval=pigeonhole_interval(
            gains, confidence=confidence, replicates=replicates, seed=bootstrap_seed
        ),
        seeds_interval=mean_interval(gains.mean(axis=1, keepdims=True)),
        confidence=confidence,
        replicates=replicates,
    )


def pigeonhole_interval(
    values: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the mean of `values` (R, N) whose rows and columns are both samples.

    Percentile interval of the "pigeonhole" bootstrap (Owen 2007, "The pigeonhole bootstrap", Annals
    of Applied Statistics 1): rows and columns are drawn anew, each with replacement and
    independently, because entries of one row are alike, and so are entries of one column.

    Args:
        values: (R, N), for instance gains by training run and initial state.
        confidence: Two-sided coverage, between 0 and 1.
        replicates: Bootstrap replicates.
        seed: Seed of the resampling, so that the interval can be reproduced.

    Returns:
        The interval of the mean.
    """
    rows, columns = values.shape
    rng = np.random.default_rng(seed)
    row_weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=replicates) / rows
    column_weights = rng.multinomial(columns, np.full(columns, 1 / columns), size=replicates)
    means = ((row_weights @ values) * column_weights).sum(axis=1) / columns
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def comparison_table(methods: Mapping[str, Sequence[PairedEvaluation]]) -> str:
    """Markdown table of several methods, each with its training seeds.

    Args:
        methods: Evaluations of the training seeds, all on the same initial states, by method.

    Returns:
        The table: median and worst seed, and the pooled difference with its bootstrap interval.
    """
    rows = []
    for label, evaluations in methods.items():
        combined = combine_seeds(evaluations)
        worst = combined.worst_run
        rows.append(
            [
                label,
                str(len(evaluations)),
                percent(float(combined.base_rates.mean())),
                percent(combined.median_tuned_rate),
                f"{percent(combined.tuned_rates[worst])} "
                f"({points(combined.worst_difference)} points)",
                f"{points(combined.difference)} points",
                f"{points_interval(combined.difference_interval)} points",
            ]
        )
    header = ["", "seeds", "base", "median", "worst against its base", "mean gain", "95% interval"]
    return table(header, rows)


def plot_comparison(
    runs: Mapping[str, Sequence[Path]], path: Path, *, kl_unit: str = "nats"
) -> Path:
    """Success, KL, λ and adjoint loss of several methods; thin lines are runs, thick ones medians.

    Args:
        runs: `metrics.jsonl` of each training seed, by the method's label.
        path: The PNG.
        kl_unit: Unit of the KL.

    Raises:
        UserError: When there is nothing to compare, or a run logged no evaluation or no KL.
    """
    loaded = load_runs(runs)
    figure, (success, kl, lam, loss) = new_figure("Comparison", rows=2, columns=2)
    for index, (label, several) in enumerate(loaded.items()):
        color = color_of(index)
        rates = [required(each, "success_rate", phases=("eval",))[0] for each in several]
        draw_runs(success, rates, color, label)
        draw_runs(kl, [required(each, "kl_estimate")[0] for each in several], color, label, True)
        draw_runs(lam, [join_phases(each, "lam") for each in several], color, label)
        losses = [join_phases(each, "adjoint_loss") for each in several]
        draw_runs(loss, losses, color, label, True)
        _draw_budgets(kl, several, color)
    success.set(ylabel="success rate", ylim=(-0.02, 1.02))
    for axes, name in ((kl, f"path KL ({kl_unit})"), (lam, "λ"), (loss, "adjoint-matching loss")):
        axes.set_ylabel(name)
        use_log_axis(axes)
    for axes in (success, kl, lam, loss):
        axes.set_xlabel("updates")
    return save(figure, path)


def _draw_budgets(axes: Axes, runs: Sequence[Metrics], color: str) -> None:
    for each in runs:
        budget = join_phases(each, "kl_budget")
        if len(budget):
            draw_series(axes, budget, "_budget", color=color, linestyle="--", linewidth=1)

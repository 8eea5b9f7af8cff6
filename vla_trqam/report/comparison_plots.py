"""Figures of several runs on the same axes: budget against budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import wilson_interval
from vla_trqam.report.figures import (
    BUDGET,
    color_of,
    finite_part,
    mark_non_finite,
    new_figure,
    required,
    save,
    smoothed,
    use_log_axis,
)
from vla_trqam.report.metrics import (
    Metrics,
    MetricSeries,
    read_metrics,
    summarise_trust_region,
)


def plot_budget_sweep(
    runs: Mapping[float, Sequence[Path]], path: Path, *, kl_unit: str = "nats"
) -> Path:
    """KL budgets against each other: does the KL follow, and what does it buy?

    Raises:
        UserError: When there is nothing to compare, or a run logged no evaluation or no KL budget.
    """
    loaded = load_runs({str(budget): paths for budget, paths in sorted(runs.items())})
    figure, (trace, success, realised, lam) = new_figure("KL budget", rows=2, columns=2)
    for index, (label, several) in enumerate(loaded.items()):
        color, budget = color_of(index), float(label)
        emas = [required(each, "kl_ema")[0] for each in several]
        draw_runs(trace, emas, color, f"budget {label}")
        trace.axhline(budget, color=color, linestyle="--", linewidth=1)
        draw_runs(lam, [required(each, "lam")[0] for each in several], color, f"budget {label}")
        for seed, each in enumerate(several):
            # Side by side on the log axis, or equal rates would hide each other.
            _draw_final_success(success, budget * 1.03**seed, each, color)
            _draw_realised(realised, each, color)
    _draw_identity(realised, sorted(runs))
    for axes in (trace, realised, lam):
        use_log_axis(axes)
    for axes in (success, realised):
        use_log_axis(axes, "x")
        axes.set_xlabel(f"KL budget ({kl_unit})")
    trace.set(xlabel="updates", ylabel=f"KL, moving average ({kl_unit})")
    lam.set(xlabel="updates", ylabel="λ")
    success.set(ylabel="success, last evaluation in training", ylim=(-0.02, 1.02))
    realised.set(ylabel=f"KL, mean of the last half ({kl_unit})")
    return save(figure, path)


def load_runs(runs: Mapping[str, Sequence[Path]]) -> dict[str, list[Metrics]]:
    """The metrics of each seed, by label.

    Raises:
        UserError: a label has no run, or there is none at all.
    """
    empty = [label for label, paths in runs.items() if not paths]
    if not runs or empty:
        raise UserError(f"nothing to compare: no runs {f'of {empty}' if empty else 'given'}")
    return {label: [read_metrics(path) for path in paths] for label, paths in runs.items()}


def draw_runs(
    axes: Axes, runs: Sequence[MetricSeries], color: str, label: str, smooth: bool = False
) -> None:
    """Each run thinly; thickly their median where all were logged at the same updates."""
    runs = [run for run in runs if len(run)]
    lines = [smoothed(run) if smooth else finite_part(run) for run in runs]
    for (step, value), run in zip(lines, runs, strict=True):
        axes.plot(step, value, color=color, linewidth=0.8, alpha=0.5)
        mark_non_finite(axes, run, label)
    if not lines:
        return
    step = lines[0][0]
    if all(np.array_equal(step, other) for other, _ in lines):
        median = np.median([value for _, value in lines], axis=0)
        # A line of one point is not to be seen.
        marker = "o" if len(step) == 1 else None
        label = _count(label, len(runs))
        axes.plot(step, median, color=color, linewidth=2, marker=marker, label=label)
    else:
        axes.plot([], [], color=color, label=_count(label, len(runs)))


def _count(label: str, runs: int) -> str:
    return label if runs == 1 else f"{label} ({runs} seeds)"


def _draw_final_success(axes: Axes, budget: float, metrics: Metrics, color: str) -> None:
    rate, episodes = required(metrics, "success_rate", "episodes", phases=("eval",))
    final, count = rate.value[-1], int(episodes.value[-1])
    limits = wilson_interval(round(final * count), count)
    bars = [[max(final - limits.low, 0)], [max(limits.high - final, 0)]]
    axes.errorbar([budget], [final], bars, fmt="o", color=color, capsize=3)


def _draw_realised(axes: Axes, metrics: Metrics, color: str) -> None:
    """Filled where λ was free; hollow where it sat on a bound more than half of the time."""
    summary = summarise_trust_region(metrics)
    if summary is None:
        raise UserError("a run of the sweep logged no kl_ema or no kl_budget")
    bound = summary.share_on_lower_bound + summary.share_on_upper_bound > 0.5
    face = "white" if bound else color
    point = axes.plot([summary.kl_budget], [summary.kl_mean], "o", color=color)
    point[0].set_markerfacecolor(face)


def _draw_identity(axes: Axes, budgets: Sequence[float]) -> None:
    ends = np.array([budgets[0] * 0.7, budgets[-1] * 1.4])
    axes.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="KL = budget")
    axes.fill_between(
        ends, 0.8 * ends, 1.2 * ends, color=BUDGET, alpha=0.15, linewidth=0, label="± 20%"
    )
    axes.plot([], [], "o", color="black", markerfacecolor="white", label="λ on a bound")

"""The pictures of a comparison: learning curves, and success over all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from vla_trqam.report.figures import BASE, CYCLE, color_of, new_figure, save
from vla_trqam.report.intervals import Interval
from vla_trqam.study.results import Result
from vla_trqam.study.statistics import Estimate, Profile, rate_interval
from vla_trqam.study.tables import grouped


def plot_curves(results: Sequence[Result], folder: Path) -> dict[Path, str]:
    """A picture a task: success against updates, and against environment steps, to the end."""
    figures = {}
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        path = folder / f"curves_{task.replace('/', '_')}.png"
        figures[_plot_task(own, path)] = f"Learning curves on {task}"
    return figures


def _plot_task(results: Sequence[Result], path: Path) -> Path:
    figure, axes = new_figure(results[0].task, columns=2)
    for index, (_, label, group) in enumerate(grouped(results)):
        curves = [result.curve_to_end for result in group]
        # A run that went on in another way may have fewer; the last is of the end.
        length = min(len(curve.rate) for curve in curves) - 1
        at = [*range(length), -1]
        rates = np.stack([curve.rate[at] for curve in curves])
        episodes = curves[0].episodes[at].tolist()
        limits = [rate_interval(*column) for column in zip(rates.T, episodes, strict=True)]
        updates = curves[0].updates[at].astype(float)
        steps = np.mean([curve.env_steps[at] for curve in curves], axis=0)
        for each, x in zip(axes, (updates, steps), strict=True):
            _draw(each, x, rates.mean(axis=0), limits, index, label)
    base = float(np.mean([result.curve.rate[0] for result in results]))
    for each, name in zip(axes, ("updates", "environment steps"), strict=True):
        each.axhline(base, color=BASE, linestyle="--", linewidth=1, label="base")
        each.set(xlabel=name, ylabel="success rate", ylim=(-0.02, 1.02))
    return save(figure, path)


def _draw(
    axes: Axes,
    x: NDArray[np.float64],
    mean: NDArray[np.float64],
    limits: Sequence[Interval],
    index: int,
    label: str,
) -> None:
    axes.plot(x, mean, style_of(index), color=color_of(index), marker=".", label=label)
    ends = ([limit.low for limit in limits], [limit.high for limit in limits])
    _band(axes, x, *ends, color_of(index))


def style_of(index: int) -> str:
    """Of a line: dotted for more methods than there are colours."""
    return "-" if index < len(CYCLE) else ":"


def _band(axes: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, color: str) -> None:
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)


def plot_aggregate(
    title: str,
    means: Mapping[str, Estimate],
    beaten: Mapping[str, Estimate],
    profiles: Mapping[str, Profile],
    path: Path,
) -> Path:
    """Interquartile means, probabilities of improvement, and performance profiles."""
    figure, (iqm, better, profile) = new_figure(title, columns=3, size=(16.0, 4.5))
    _draw_estimates(iqm, means, "interquartile mean of success")
    _draw_estimates(better, beaten, f"P({next(iter(means))} is better)")
    better.axvline(0.5, color=BASE, linestyle="--", linewidth=1)
    for index, (label, found) in enumerate(profiles.items()):
        color = color_of(index)
        profile.plot(found.thresholds, found.share, style_of(index), color=color, label=label)
        _band(profile, found.thresholds, found.low, found.high, color)
    profile.set(xlabel="success", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    return save(figure, path)


def _draw_estimates(axes: Axes, found: Mapping[str, Estimate], name: str) -> None:
    for row, estimate in enumerate(found.values()):
        low, high = estimate.interval.low, estimate.interval.high
        axes.plot([low, high], [row, row], color="#0072B2", linewidth=4, alpha=0.4)
        axes.plot([estimate.value], [row], "o", color="#0072B2")
    axes.set(xlabel=name, xlim=(-0.02, 1.02))
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()

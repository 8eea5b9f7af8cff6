"""What the figures share: colours, figures without global state, lines that hide nothing."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from vla_trqam.errors import UserError
from vla_trqam.report.metrics import TRAINING_PHASES, Metrics, MetricSeries, join_phases

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BASE = "#777777"
TUNED = "#0072B2"
BUDGET = "#D55E00"
GAINED = "#009E73"
LOST = "#CC3311"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# A smoothed line averages over this share of the run.
SMOOTHING = 1 / 50


def new_figure(
    title: str,
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
    heights: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no pyplot, hence no display and no global state) and its axes.

    `heights` are the rows' relative heights, equal ones if not given.
    """
    figure = Figure(
        figsize=size or (6.4 * columns, 1.0 + 3.0 * rows), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(rows * columns)]
    for each in axes:
        each.grid(visible=True, color="#e5e5e5", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG, with a legend in every panel that has something to name."""
    for axes in figure.axes:
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png")
    return path


class PlainLogFormatter(LogFormatter):
    """Labels the ticks that LogFormatter would, with 0.5 in place of 5e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick at `x`; empty where there is no room."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def use_log_axis(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic; zero and negative values are left out."""
    set_scale, axis = (
        (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    )
    set_scale("log", nonpositive="mask")
    axis.set_major_formatter(PlainLogFormatter())
    axis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(1.5, 0.5)))


def required(
    metrics: Metrics, *names: str, phases: tuple[str, ...] = TRAINING_PHASES
) -> list[MetricSeries]:
    """Series that a figure cannot do without.

    Raises:
        UserError: When the run did not log one of them.
    """
    series = [join_phases(metrics, name, phases) for name in names]
    for name, each in zip(names, series, strict=True):
        if len(each) == 0:
            raise UserError(f"the run logged no {name!r} in the phases {', '.join(phases)}")
    return series


def draw_series(axes: Axes, series: MetricSeries, label: str, **style: Any) -> None:
    """A line against updates; crosses on the upper edge where the number was not finite."""
    values = np.where(np.isfinite(series.value), series.value, np.nan)
    axes.plot(series.step, values, label=label, **style)
    mark_non_finite(axes, series, label)


def draw_noisy(axes: Axes, series: MetricSeries, color: str, label: str) -> None:
    """A noisy metric: every value faintly, and its moving average."""
    axes.plot(*finite_part(series), color=color, alpha=0.3, linewidth=0.8)
    axes.plot(*smoothed(series), color=color, linewidth=1.8, label=label)
    mark_non_finite(axes, series, label)


def mark_non_finite(axes: Axes, series: MetricSeries, label: str) -> None:
    """Crosses on the upper edge of the axes at the steps that logged NaN or infinity."""
    at = series.step[~np.isfinite(series.value)]
    if len(at):
        edge = axes.get_xaxis_transform()  # x in data, y as a share of the axes
        height = np.full(len(at), 0.98)
        axes.plot(at, height, "x", color=LOST, transform=edge, label=f"not finite: {label}")


def finite_part(series: MetricSeries) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values without NaN and infinities."""
    finite = np.isfinite(series.value)
    return series.step[finite], series.value[finite]


def smoothed(series: MetricSeries) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and moving average of the finite values, over a fiftieth of the run."""
    step, value = finite_part(series)
    if len(value) == 0:
        return step, value
    window = max(round(len(value) * SMOOTHING), 1)
    before = window // 2
    centres = step[before : before + len(step) - window + 1]
    return centres, np.convolve(value, np.full(window, 1 / window), mode="valid")


def mark_phases(axes: Axes, metrics: Metrics) -> None:
    """A dotted line where the online phase begins."""
    starts = [series.step[0] for series in metrics.get("online", {}).values()]
    if starts and "offline" in metrics:
        axes.axvline(min(starts), color="black", linestyle=":", linewidth=1, label="online begins")


def color_of(index: int) -> str:
    """Colour of the index-th run of a comparison."""
    return CYCLE[index % len(CYCLE)]

"""Figures of one run: each function draws one PNG from `metrics.jsonl` or from given arrays.

Numbers that are not finite cannot be drawn and are not hidden either: a cross on the upper edge of
the axes marks each step that logged one. `figures.py` holds what the figures share,
`comparison_plots.py` the figures of several runs.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import Interval, PairedEvaluation, wilson_interval
from vla_trqam.report.figures import (
    BASE,
    BUDGET,
    GAINED,
    LOST,
    TUNED,
    draw_noisy,
    draw_series,
    mark_phases,
    new_figure,
    required,
    save,
    use_log_axis,
)
from vla_trqam.report.metrics import (
    TRAINING_PHASES,
    Metrics,
    MetricSeries,
    join_phases,
    on_same_lines,
    read_metrics,
)

# The online success rate is a moving one, over at most and at least so many episodes.
ONLINE_WINDOW = 50
ONLINE_LEAST = 10


def plot_run(
    metrics_path: Path,
    folder: Path,
    *,
    evaluation: PairedEvaluation | None = None,
    kl_unit: str = "nats",
) -> list[Path]:
    """Draw every figure that the run has numbers for into a folder, made if absent.

    Returns:
        The files written. A figure is left out when the run logged none of its metrics (a run that
        only cloned behaviour has no λ).
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = read_metrics(metrics_path)
    written = []
    if _logged(metrics, "bc_loss", ("pretrain",)):
        written.append(plot_pretraining(metrics, folder / "pretraining.png"))
    if evaluation is not None:
        written.append(plot_episodes(evaluation, folder / "episodes.png"))
        if evaluation.by_task():
            written.append(plot_by_task(evaluation, folder / "success_by_task.png"))
    if _logged(metrics, "success_rate", ("eval",)) or _logged(metrics, "success", ("online",)):
        written.append(plot_success(metrics, folder / "success.png", evaluation=evaluation))
    if _logged(metrics, "kl_estimate"):
        written.append(plot_kl(metrics, folder / "kl.png", kl_unit=kl_unit))
    if _logged(metrics, "lam"):
        written.append(plot_lambda(metrics, folder / "lambda.png"))
    if _logged(metrics, "adjoint_loss"):
        written.append(plot_adjoint(metrics, folder / "adjoint.png"))
    if _logged(metrics, "td_loss"):
        written.append(plot_critic(metrics, folder / "critic.png"))
    return written


def plot_success(
    metrics: Metrics, path: Path, *, evaluation: PairedEvaluation | None = None
) -> Path:
    """Success rate against updates, with Wilson's 95% intervals.

    Drawn are the evaluations during training, the running rate over the last 50 online episodes,
    and, from the paired evaluation, the base policy (a band) and the tuned one (at the last step).
    """
    figure, (axes,) = new_figure("Success rate")
    last_step = _last_step(metrics)
    if evaluation is not None:
        _band(axes, evaluation.base_rate, evaluation.base_interval(), "base")
    if _logged(metrics, "success_rate", ("eval",)):
        rate, episodes = required(metrics, "success_rate", "episodes", phases=("eval",))
        _draw_evaluations(axes, rate, episodes)
    if _logged(metrics, "success", ("online",)):
        _draw_online_success(axes, join_phases(metrics, "success", ("online",)))
    if evaluation is not None:
        tuned = evaluation.tuned_interval()
        bars = [[evaluation.tuned_rate - tuned.low], [tuned.high - evaluation.tuned_rate]]
        label = f"tuned, final: {len(evaluation)} episodes"
        axes.errorbar([last_step], [evaluation.tuned_rate], bars, fmt="D", color=TUNED, label=label)
    axes.set(xlabel="updates", ylabel="success rate", ylim=(-0.02, 1.02))
    return save(figure, path)


def plot_by_task(evaluation: PairedEvaluation, path: Path) -> Path:
    """Success of base and tuned policy in each task of a suite, with Wilson's 95% intervals."""
    tasks = evaluation.by_task()
    figure, (axes,) = new_figure("Success by task")
    places = np.arange(len(tasks))
    for shift, label, color in ((-0.12, "base", BASE), (0.12, "tuned", TUNED)):
        for place, pair in zip(places, tasks.values(), strict=True):
            tuned = label == "tuned"
            rate = pair.tuned_rate if tuned else pair.base_rate
            limits = pair.tuned_interval() if tuned else pair.base_interval()
            bars = [[max(rate - limits.low, 0.0)], [max(limits.high - rate, 0.0)]]
            named = label if place == 0 else None
            axes.errorbar(
                [rate], [place + shift], xerr=bars, fmt="o", color=color, capsize=3, label=named
            )
    texts = [f"{_short(task)} ({len(pair)})" for task, pair in tasks.items()]
    axes.set_yticks(places, texts)
    axes.invert_yaxis()
    axes.set(xlabel="success rate", xlim=(-0.02, 1.02), ylim=(len(tasks) - 0.5, -0.5))
    return save(figure, path)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def plot_pretraining(metrics: Metrics, path: Path) -> Path:
    """Behaviour-cloning loss of the pretraining, on a log axis."""
    figure, (axes,) = new_figure("Pretraining by behaviour cloning")
    (loss,) = required(metrics, "bc_loss", phases=("pretrain",))
    draw_noisy(axes, loss, TUNED, "flow-matching loss")
    use_log_axis(axes)
    axes.set(xlabel="updates", ylabel="loss (normalised actions²)")
    return save(figure, path)


def plot_kl(metrics: Metrics, path: Path, *, kl_unit: str = "nats") -> Path:
    """Path-space KL between tuned and base policy: estimates, moving average, budget."""
    figure, (axes,) = new_figure("KL from the base policy, and its budget")
    (estimate,) = required(metrics, "kl_estimate")
    draw_series(axes, estimate, color=TUNED, alpha=0.3, linewidth=0.8, label="estimate")
    if _logged(metrics, "kl_ema"):
        ema = join_phases(metrics, "kl_ema")
        draw_series(axes, ema, color=TUNED, linewidth=2, label="moving average")
    if _logged(metrics, "kl_budget"):
        budget = join_phases(metrics, "kl_budget")
        draw_series(axes, budget, color=BUDGET, linestyle="--", label="budget ± 20%")
        low, high = 0.8 * budget.value, 1.2 * budget.value
        axes.fill_between(budget.step, low, high, color=BUDGET, alpha=0.12, linewidth=0)
    mark_phases(axes, metrics)
    axes.set(xlabel="updates", ylabel=f"path KL ({kl_unit})", ylim=(0, None))
    return save(figure, path)


def plot_lambda(metrics: Metrics, path: Path) -> Path:
    """The trust region's multiplier λ with its bounds, on a log axis."""
    figure, (axes,) = new_figure("Multiplier of the trust region")
    draw_series(axes, required(metrics, "lam")[0], color=TUNED, linewidth=1.5, label="λ")
    for name, label in (("lam_min", "lower bound"), ("lam_max", "upper bound")):
        if _logged(metrics, name):
            series = join_phases(metrics, name)
            draw_series(axes, series, color=BUDGET, linestyle="--", linewidth=1, label=label)
    use_log_axis(axes)
    mark_phases(axes, metrics)
    axes.set(xlabel="updates", ylabel="λ (return per nat)")
    return save(figure, path)


def plot_adjoint(metrics: Metrics, path: Path) -> Path:
    """Norm of the lean adjoint at both ends of the flow, and the matching loss; log axes."""
    figure, (norms, loss) = new_figure("Adjoint", rows=2)
    ends = (("terminal", "at τ = 1: |∇Q|", BUDGET), ("initial", "at τ = 0", TUNED))
    for end, label, color in ends:
        if _logged(metrics, f"adjoint_norm_{end}"):
            draw_noisy(norms, join_phases(metrics, f"adjoint_norm_{end}"), color, label)
    draw_noisy(loss, required(metrics, "adjoint_loss")[0], TUNED, "adjoint-matching loss")
    for axes, label in ((norms, "norm of the adjoint\n(mean per sample)"), (loss, "loss")):
        use_log_axis(axes)
        mark_phases(axes, metrics)
        axes.set(xlabel="updates", ylabel=label)
    return save(figure, path)


def plot_critic(metrics: Metrics, path: Path) -> Path:
    """TD loss on a log axis, and the mean Q with the ensemble's disagreement and the targets."""
    figure, (loss, value) = new_figure("Critic", rows=2)
    draw_noisy(loss, required(metrics, "td_loss")[0], TUNED, "TD loss")
    use_log_axis(loss)
    if _logged(metrics, "q_mean"):
        mean = join_phases(metrics, "q_mean")
        draw_series(value, mean, color=TUNED, linewidth=1.5, label="Q, mean of the batch")
        if _logged(metrics, "q_std"):
            _draw_disagreement(value, metrics)
    if _logged(metrics, "target_mean"):
        target = join_phases(metrics, "target_mean")
        draw_series(value, target, color=BUDGET, linewidth=1, label="TD target, mean of the batch")
    for axes, label in ((loss, "TD loss (return²)"), (value, "discounted return")):
        mark_phases(axes, metrics)
        axes.set(xlabel="updates", ylabel=label)
    return save(figure, path)


def plot_q_against_returns(
    q: ArrayLike, returns: ArrayLike, path: Path, *, success: ArrayLike | None = None
) -> Path:
    """Is the critic right where the truth is known? Q of executed chunks against what followed.

    Args:
        q: (N,) the critic's values.
        returns: (N,) Monte-Carlo discounted returns-to-go; NaN where unknown (a truncated episode).
        path: The PNG.
        success: (N,) bool, whether the episode succeeded; tells the points apart.

    Raises:
        ValueError: When the arrays disagree in length or no return is known.
    """
    values, truth = np.asarray(q, dtype=float), np.asarray(returns, dtype=float)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ValueError(f"q {values.shape} and returns {truth.shape} must be (N,) alike")
    known = np.isfinite(truth) & np.isfinite(values)
    if not known.any():
        raise ValueError("no pair of a finite Q and a known return")
    figure, (axes,) = new_figure("Critic against Monte-Carlo returns", size=(5.2, 5.2))
    good = None if success is None else np.asarray(success, dtype=bool)[known]
    values, truth = values[known], truth[known]
    _scatter(axes, truth, values, good)
    ends = [min(truth.min(), values.min()), max(truth.max(), values.max())]
    axes.plot(ends, ends, color="black", linewidth=1, linestyle="--", label="Q = return")
    bias, rank = (values - truth).mean(), rank_correlation(values, truth)
    axes.set_title(
        f"{known.sum()} of {len(known)} steps, bias {bias:+.3g}, rank correlation {rank:.2f}"
    )
    axes.set(xlabel="Monte-Carlo discounted return", ylabel="Q")
    return save(figure, path)


def plot_episodes(evaluation: PairedEvaluation, path: Path) -> Path:
    """Every initial state of the paired evaluation: kept, gained, lost, or failed by both."""
    outcomes = {
        "kept": (evaluation.kept, TUNED),
        "gained": (evaluation.gained, GAINED),
        "lost": (evaluation.lost, LOST),
        "both failed": (evaluation.failed_both, "#d0d0d0"),
    }
    title = "Base and tuned policy on the same initial states"
    figure, (strip, steps) = new_figure(title, rows=2, size=(6.4, 5.6), heights=(1, 3))
    left = 0
    for outcome, (seeds, color) in outcomes.items():
        strip.barh(0, len(seeds), left=left, color=color, label=f"{outcome}: {len(seeds)}")
        left += len(seeds)
        mask = np.isin(evaluation.seeds, seeds)
        base, tuned = evaluation.base_steps[mask], evaluation.tuned_steps[mask]
        steps.plot(base, tuned, "o", color=color, markeredgecolor="#555555", markersize=5)
    strip.set(xlabel="initial states", yticks=[], xlim=(0, left), ylim=(-0.4, 1.2))
    strip.legend(frameon=False, fontsize="small", ncols=len(outcomes), loc="upper center")
    longest = max(evaluation.base_steps.max(), evaluation.tuned_steps.max())
    steps.plot([0, longest], [0, longest], color="black", linewidth=1, linestyle="--")
    steps.set(xlabel="control steps of the base's episode", ylabel="control steps, tuned")
    return save(figure, path)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; NaN when one of the two is constant."""
    if min(np.ptp(first), np.ptp(second)) == 0:
        return float("nan")  # scipy's answer too, with a warning
    return float(stats.spearmanr(first, second).statistic)


def _logged(metrics: Metrics, name: str, phases: tuple[str, ...] = TRAINING_PHASES) -> bool:
    return len(join_phases(metrics, name, phases)) > 0


def _last_step(metrics: Metrics) -> int:
    """Of the updates that moved the policy; other phases count their own."""
    phases = [metrics[name] for name in (*TRAINING_PHASES, "eval") if name in metrics]
    steps = [series.step[-1] for names in phases for series in names.values()]
    if not steps:
        raise UserError("the metrics are empty: there is nothing to draw")
    return int(max(steps))


def _band(axes: Axes, rate: float, interval: Interval, label: str) -> None:
    axes.axhspan(interval.low, interval.high, color=BASE, alpha=0.15, linewidth=0)
    axes.axhline(rate, color=BASE, linewidth=1.5, label=label)


def _draw_evaluations(axes: Axes, rate: MetricSeries, episodes: MetricSeries) -> None:
    counts = episodes.value.astype(int)
    successes = np.rint(rate.value * counts).astype(int)
    limits = [wilson_interval(int(k), int(n)) for k, n in zip(successes, counts, strict=True)]
    bars = [
        [value - limit.low for value, limit in zip(rate.value, limits, strict=True)],
        [limit.high - value for value, limit in zip(rate.value, limits, strict=True)],
    ]
    axes.errorbar(rate.step, rate.value, np.maximum(bars, 0), fmt="o-", color=TUNED, label="tuned")


def _draw_online_success(axes: Axes, success: MetricSeries) -> None:
    """Rate over the last online episodes; a rate of a handful says nothing and is left out."""
    ends = np.arange(ONLINE_LEAST, len(success) + 1)
    # Of the episodes between two updates, the last one's rate is drawn.
    ends = ends[np.append(np.diff(success.step[ends - 1]) > 0, np.ones(min(len(ends), 1), bool))]
    counts = np.minimum(ends, ONLINE_WINDOW)
    total = np.concatenate([[0], np.cumsum(success.value)])
    wins, step = total[ends] - total[ends - counts], success.step[ends - 1]
    limits = [wilson_interval(int(k), int(n)) for k, n in zip(wins, counts, strict=True)]
    label = f"online: last {ONLINE_WINDOW} episodes"
    axes.plot(step, wins / counts, color=GAINED, linewidth=1, label=label)
    low, high = [limit.low for limit in limits], [limit.high for limit in limits]
    axes.fill_between(step, low, high, color=GAINED, alpha=0.12, linewidth=0)


def _draw_disagreement(axes: Axes, metrics: Metrics) -> None:
    mean, spread = on_same_lines(metrics, "q_mean", "q_std")
    low, high = mean.value - spread.value, mean.value + spread.value
    label = "± standard deviation of the ensemble"
    axes.fill_between(mean.step, low, high, color=TUNED, alpha=0.2, linewidth=0, label=label)


def _scatter(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], good: NDArray[np.bool_] | None
) -> None:
    if good is None:
        axes.plot(x, y, "o", color=TUNED, markersize=3, alpha=0.4, label="steps")
        return
    for mask, color, label in ((good, GAINED, "successful"), (~good, LOST, "failed")):
        axes.plot(x[mask], y[mask], "o", color=color, markersize=3, alpha=0.4, label=label)

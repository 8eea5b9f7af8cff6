"""What `critic_uphill.py` tells: paired differences, a table, a figure and the raw numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uphill.probe import ARMS, CONTRASTS, Decision, Outcome, PairedDifference
from vla_trqam.report.figures import BUDGET, GAINED, LOST, TUNED, new_figure, save
from vla_trqam.report.formats import percent, points, points_interval, table
from vla_trqam.report.plots import rank_correlation

COLORS = {"up": GAINED, "down": LOST, "random": BUDGET}


@dataclass(frozen=True, eq=False)
class StepResult:
    """One step size: N decisions by arm.

    Attributes:
        step: root mean square of the moves.
        outcomes: by arm, "base" included; N each.
        q: Q of the executed chunks by arm, (N,) each.
        executed: root mean square of the moves after the clip, by arm.
    """

    step: float
    outcomes: dict[str, list[Outcome]]
    q: dict[str, np.ndarray]
    executed: dict[str, float]

    def returns(self, arm: str) -> np.ndarray:
        """(N,)."""
        return np.array([outcome.discounted_return for outcome in self.outcomes[arm]])

    def return_difference(self, arm: str, other: str) -> PairedDifference:
        """Of the discounted returns."""
        return PairedDifference.of(self.returns(arm) - self.returns(other))

    def success_difference(self, arm: str, other: str) -> PairedDifference:
        """Of the success rates."""
        pairs = zip(self.outcomes[arm], self.outcomes[other], strict=True)
        return PairedDifference.of(np.array([float(a.success) - b.success for a, b in pairs]))

    def predicted(self, arm: str, other: str) -> float:
        """The mean difference that Q promises."""
        return float((self.q[arm] - self.q[other]).mean())


def q_against_returns(result: StepResult) -> dict[str, float]:
    """How Q of the base's chunk and the return after it go together."""
    q, returns = result.q["base"], result.returns("base")
    varies = np.ptp(q) > 0 and np.ptp(returns) > 0
    return {
        "correlation": float(np.corrcoef(q, returns)[0, 1]) if varies else float("nan"),
        "rank_correlation": rank_correlation(q, returns),
        "bias": float((q - returns).mean()),
    }


def describe(results: Sequence[StepResult], follower: str) -> str:
    """The table, and a verdict for every step size."""
    header = ["RMS step", "arms", "return difference", "95% interval", "Q promises"]
    header += ["success, points", "95% interval"]
    rows, verdicts = [], []
    for result in results:
        for arm, other in CONTRASTS:
            worth, success = (
                result.return_difference(arm, other),
                result.success_difference(arm, other),
            )
            rows.append(
                [
                    f"{result.step:g}",
                    f"{arm} - {other}",
                    f"{worth.mean:+.3f}",
                    f"{worth.interval.low:+.3f} to {worth.interval.high:+.3f}",
                    f"{result.predicted(arm, other):+.3f}",
                    points(success.mean),
                    points_interval(success.interval),
                ]
            )
        verdicts.append(f"- RMS step {result.step:g}: {verdict(result)}")
    outcomes, fit = results[0].outcomes["base"], q_against_returns(results[0])
    rate = float(np.mean([outcome.success for outcome in outcomes]))
    facts = (
        f"{len(outcomes)} states of the base policy; after its chunk the {follower} policy "
        f"succeeds in {percent(rate)}. Q against these returns: correlation "
        f"{fit['correlation']:.2f}, rank correlation {fit['rank_correlation']:.2f}, bias "
        f"{fit['bias']:+.2f}."
    )
    return "\n\n".join([table(header, rows), facts, "\n".join(verdicts)])


def verdict(result: StepResult) -> str:
    """Uphill, downhill, or not shown, by up minus down; and whether the whole move pays.

    Up minus down is the slope along the gradient. A slope that is right can still be followed too
    far: up minus base tells.
    """
    slope = result.return_difference("up", "down").interval
    gain = result.return_difference("up", "base").interval
    if not slope.excludes_zero():
        return "neither uphill nor downhill is shown (up - down includes zero)"
    direction = "the gradient is uphill" if slope.low > 0 else "the gradient is **downhill**"
    if not gain.excludes_zero():
        return f"{direction}; a gain on the base's chunk is not shown (up - base includes zero)"
    return (
        f"{direction}; the move {'gains on' if gain.low > 0 else '**loses to**'} the base's chunk"
    )


def to_json(
    decisions: Sequence[Decision], results: Sequence[StepResult], about: dict[str, Any]
) -> dict[str, Any]:
    """Every number: settings, summaries, and each state by arm."""
    steps = [
        {
            "step": result.step,
            "verdict": verdict(result),
            "executed_rms": result.executed,
            "differences": {
                f"{arm}-{other}": {
                    "return": asdict(result.return_difference(arm, other)),
                    "success": asdict(result.success_difference(arm, other)),
                    "q": result.predicted(arm, other),
                }
                for arm, other in CONTRASTS
            },
            "q": {arm: values.tolist() for arm, values in result.q.items()},
            "outcomes": {arm: [asdict(o) for o in each] for arm, each in result.outcomes.items()},
        }
        for result in results
    ]
    return {
        **about,
        "q_against_returns": q_against_returns(results[0]),
        "states": [{"seed": d.seed, "decision": d.number} for d in decisions],
        "steps": steps,
    }


def draw(results: Sequence[StepResult], path: Path, title: str) -> Path:
    """Differences from the base's chunk by step, and Q against returns."""
    figure, (worth, success, scatter) = new_figure(title, columns=3)
    for index, arm in enumerate(ARMS):
        # Side by side, or the bars would hide each other.
        at = [result.step * (0.97 + 0.03 * index) for result in results]
        for axes, differences in (
            (worth, [result.return_difference(arm, "base") for result in results]),
            (success, [result.success_difference(arm, "base") for result in results]),
        ):
            mean = np.array([each.mean for each in differences])
            low = [each.mean - each.interval.low for each in differences]
            high = [each.interval.high - each.mean for each in differences]
            bars = np.maximum([low, high], 0.0)
            axes.errorbar(at, mean, bars, fmt="o-", color=COLORS[arm], capsize=3, label=arm)
    for axes, label in ((worth, "return"), (success, "success rate")):
        axes.axhline(0.0, color="black", linewidth=1)
        axes.set(xlabel="RMS step of the move", ylabel=f"{label}: moved minus base's chunk")
    q, returns = results[0].q["base"], results[0].returns("base")
    scatter.plot(returns, q, "o", color=TUNED, alpha=0.6)
    ends = [min(q.min(), returns.min()), max(q.max(), returns.max())]
    scatter.plot(ends, ends, color="black", linewidth=1, linestyle="--", label="Q = return")
    scatter.set(xlabel="Monte-Carlo return after the base's chunk", ylabel="Q")
    return save(figure, path)

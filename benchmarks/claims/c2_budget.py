"""Claim 2: lambda inside the loss keeps the KL to its target, a penalty beside it drifts above.

    python benchmarks/claims/studies.py c2 --folder outputs/c2 --commands    # the runs
    python benchmarks/claims/c2_budget.py --runs outputs/c2/* \
        --output docs/figures/c2_budget.png --page docs/claims.md

Reads run folders. *Realised* is the mean of the unclipped estimates over the last half of the
logged updates; *drift* how much of the target a straight line through them gains in that half;
*within a fifth* the share of its lines on which the KL's moving average is: a dual with additive
steps forces the mean over time nearly by itself, however widely the KL swings. *On a bound* is the
share with lambda on a bound of its bracket, where the KL is not the dual's to keep: such runs say
nothing of the penalty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import write_claim
from claim_runs import ClaimRun, from_runs, grouped, mean_and_spread

from vla_trqam.errors import UserError
from vla_trqam.report.figures import BUDGET, TUNED, new_figure, save, use_log_axis
from vla_trqam.report.formats import table
from vla_trqam.report.metrics import TRAINING_PHASES, join_phases, on_same_lines

INTERNAL, EXTERNAL = "trqam", "external_kl"
COLORS = {INTERNAL: TUNED, EXTERNAL: BUDGET}
FIFTH, MOST = 0.2, 0.5
"""A target is kept where most lines are within a fifth; a dual is at work where most are free."""
HEADER = (
    *("method", "target", "seeds", "realised over target", "within a fifth", "drift"),
    *("λ at the end", "on a bound", "base → tuned, %"),
)


@dataclass(frozen=True)
class Kept:
    """How one run kept its target, over the last half of its logged updates.

    Attributes:
        run: which.
        target: its budget.
        realised: mean KL, in targets.
        within: share of the lines whose moving average is within a fifth of the target.
        drift: what a straight line gains, in targets.
        lam: the last lambda.
        on_bound: share of the lines with lambda on its bracket.
    """

    run: ClaimRun
    target: float
    realised: float
    within: float
    drift: float
    lam: float
    on_bound: float

    @classmethod
    def of(cls, run: ClaimRun) -> Self:
        """Reads a run.

        Raises:
            UserError: it logged no KL with a budget.
        """
        names = ("kl_estimate", "kl_ema", "lam", "lam_min", "lam_max", "kl_budget")
        series = on_same_lines(run.metrics, *names)
        if len(series[0]) < 4:
            raise UserError(f"{run.folder} logged no KL with a budget on four lines at least")
        step = series[0].step
        late = step >= (step[0] + step[-1]) / 2
        kl, average, lam, low, high, budget = (each.value[late] for each in series)
        target = float(budget[-1])
        place = (step[late] - step[late][0]) / (step[-1] - step[late][0])
        slope = np.polyfit(place, kl, 1)[0]
        bound = (lam <= low) | (lam >= high)
        return cls(
            run,
            target,
            float(kl.mean()) / target,
            float((np.abs(average / target - 1.0) <= FIFTH).mean()),
            float(slope) / target,
            float(lam[-1]),
            float(bound.mean()),
        )

    @property
    def kept(self) -> bool:
        """Whether the KL was near its target most of the time, and on average."""
        return self.within >= MOST and abs(self.realised - 1.0) <= FIFTH

    @property
    def free(self) -> bool:
        """Whether the dual could have kept it."""
        return self.on_bound < MOST

    @property
    def method(self) -> str:
        """Its name."""
        return str(self.run.method["type"])


def rows_of(kept: Sequence[Kept]) -> list[list[str]]:
    """A row a method and target."""
    rows = []
    for (method, target), members in sorted(_by_place(kept).items()):
        bases = [m.run.base for m in members if m.run.base is not None]
        tuned = [m.run.tuned for m in members if m.run.tuned is not None]
        rows.append(
            [
                *(method, f"{target:g}", str(len(members))),
                _range(m.realised for m in members),
                f"{100 * np.mean([m.within for m in members]):.0f}%",
                _range(m.drift for m in members),
                _range(m.lam for m in members),
                f"{100 * np.mean([m.on_bound for m in members]):.0f}%",
                f"{mean_and_spread(bases)} → {mean_and_spread(tuned)}",
            ]
        )
    return rows


def _by_place(kept: Sequence[Kept]) -> dict[tuple[str, float], list[Kept]]:
    by_run = {id(each.run): each for each in kept}
    groups = grouped(
        [k.run for k in kept], lambda run: (by_run[id(run)].method, by_run[id(run)].target)
    )
    return {key: [by_run[id(run)] for run in runs] for key, runs in groups.items()}


def _range(values: object) -> str:
    listed = list(values)  # type: ignore[call-overload]
    return f"{np.mean(listed):.3g} ({min(listed):.3g} to {max(listed):.3g})"


def verdict(kept: Sequence[Kept]) -> str:
    """Who keeps the target within a fifth, and who lies above where its dual is at work."""
    own, other = ([k for k in kept if k.method == name] for name in (INTERNAL, EXTERNAL))
    if not own or not other:
        raise UserError(f"claim 2 compares runs of {INTERNAL} with runs of {EXTERNAL}: give both")
    free = [k for k in other if k.free]
    keeps, above_target = sum(k.kept for k in own), sum(k.realised > 1.0 + FIFTH for k in free)
    inside = "holds" if keeps == len(own) else "does not hold"
    outside = "not tested"
    if free:
        outside = "holds" if above_target == len(free) else "does not hold"
    on_average = sum(abs(k.realised - 1.0) <= FIFTH for k in own)
    return (
        f"**Lambda inside keeps the target: {inside}** (within a fifth most of the time in {keeps} "
        f"of {len(own)} runs, on average in {on_average}). **The penalty outside lies above it: "
        f"{outside}** (by more than a fifth in {above_target} of the {len(free)} runs whose dual "
        f"is at work; in the other {len(other) - len(free)} its weight lies on a bound)."
    )


def draw(path: Path, kept: Sequence[Kept]) -> Path:
    """The KL over its target against updates, a panel a target."""
    targets = sorted({each.target for each in kept})
    size = (4.6 * len(targets), 3.8)
    figure, panels = new_figure("The KL over its target", columns=len(targets), size=size)
    for axes, target in zip(panels, targets, strict=True):
        seen: set[str] = set()
        for each in (k for k in kept if k.target == target):
            series = join_phases(each.run.metrics, "kl_ema", TRAINING_PHASES)
            label = None if each.method in seen else each.method
            seen.add(each.method)
            color = COLORS.get(each.method, "black")
            axes.plot(series.step, series.value / target, color=color, label=label, linewidth=1)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"target {target:g}", fontsize="medium")
        axes.set_xlabel("updates")
        use_log_axis(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def kept_of(runs: Sequence[ClaimRun]) -> list[Kept]:
    """What each run kept of its budget."""
    return [Kept.of(run) for run in runs]


def tell(kept: Sequence[Kept]) -> str:
    """Verdict and table."""
    return f"{verdict(kept)}\n\n{table(HEADER, rows_of(kept))}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no run of the two methods."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c2", about, arguments, from_runs(kept_of), tell, draw)


if __name__ == "__main__":
    sys.exit(main())

"""The page of a sweep of KL budgets: what a budget buys, whether the KL keeps it, which to take."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.report.comparison_plots import plot_budget_sweep
from vla_trqam.report.formats import percent, table
from vla_trqam.report.metrics import TrustRegionSummary
from vla_trqam.report.page import write_json
from vla_trqam.study.comparison import PICTURES, how_it_was_made
from vla_trqam.study.plan import StudyRun
from vla_trqam.study.results import Result
from vla_trqam.study.settings import SweepConfig
from vla_trqam.study.statistics import Estimate, rank_correlation
from vla_trqam.study.tables import mean_sd, missing_line

NOTES = (
    "KL: mean of the unclipped estimates over the last half of the updates, beside its budget. "
    "On a bound: share of that time with λ on a bound, where the KL need not follow.",
    "Rank correlation: Spearman's over all runs of the task, with a 95% interval of a bootstrap "
    "of the runs. Where one of the two does not vary it is 0.",
    "Recommended: the smallest budget whose mean success is within one standard error of the best "
    "budget's, by its seeds; none where the best is not above the base. A budget that lacks runs "
    "which others have is left aside.",
)


@dataclass(frozen=True)
class Response:
    """A task's answer to the budgets.

    Attributes:
        task: its name.
        unit: of budgets and KL.
        held: share of the time, at the recommended budget, with λ free of its bounds.
        success: rank correlation of budget and final success.
        kl: rank correlation of budget and realised KL.
        recommended: a budget; None where no budget is better than the base.
        reason: why that one.
    """

    task: str
    unit: str
    held: float
    success: Estimate
    kl: Estimate
    recommended: float | None
    reason: str

    def sentence(self) -> str:
        """For the page's head."""
        budget = self.recommended
        advice = "no budget can" if budget is None else f"take a budget of {budget:g} {self.unit}"
        return (
            f"**{self.task}: {advice}{' be recommended' if budget is None else ''}** "
            f"({self.reason}).{self._warning()} Rank correlation of budget and success "
            f"{_estimate(self.success)}, of budget and realised KL {_estimate(self.kl)}."
        )

    def _warning(self) -> str:
        if self.held > 0.5:
            return ""
        return " There λ sat on a bound most of the time: it is the bound that this recommends."


def write_sweep(settings: SweepConfig, runs: Sequence[StudyRun], results: Sequence[Result]) -> str:
    """Writes page, CSV, JSON and pictures into the study's folder; returns the page.

    Raises:
        UserError: no run is finished, or one has no KL budget.
    """
    folder = settings.output_dir
    assert folder is not None
    if not results:
        raise UserError(f"no run of {folder} is finished: there is nothing to say of its budgets")
    (folder / PICTURES).mkdir(exist_ok=True)
    by_task = {
        task: by_budget([result for result in results if result.task == task])
        for task in dict.fromkeys(result.task for result in results)
    }
    responses = [response(task, groups) for task, groups in by_task.items()]
    page = [
        f"# KL budgets of {settings.method} on {', '.join(by_task)}",
        *(each.sentence() for each in responses),
        missing_line(results, [(run.task, run.label, run.seed) for run in runs]),
    ]
    for each in responses:
        groups = by_task[each.task]
        path = _draw(each, groups, folder / PICTURES)
        page += [f"## {each.task}", budget_table(groups, each.unit)]
        page += [f"![{each.task}: KL budgets]({PICTURES}/{path.name})"]
    page += ["\n".join(f"- {note}" for note in NOTES), how_it_was_made()]
    text = "\n\n".join(part for part in page if part) + "\n"
    with written_whole(folder / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    rows = [row(result) for result in results]
    _write_csv(rows, folder / "table.csv")
    write_json(
        folder / "summary.json", {"responses": [asdict(each) for each in responses], "runs": rows}
    )
    return text


def by_budget(results: Sequence[Result]) -> dict[float, list[Result]]:
    """The runs of each budget, the smallest first.

    Raises:
        UserError: a run logged no KL budget.
    """
    groups: dict[float, list[Result]] = {}
    for result in results:
        if result.trust_region is None:
            raise UserError(f"{result.folder} logged no KL budget: its method has none")
        groups.setdefault(result.trust_region.kl_budget, []).append(result)
    return dict(sorted(groups.items()))


def response(task: str, groups: Mapping[float, Sequence[Result]]) -> Response:
    """How success and KL answer to the budget, and which to take."""
    runs = [(budget, result) for budget, group in groups.items() for result in group]
    budgets = np.array([budget for budget, _ in runs])
    kl = np.array([_region(result).kl_mean for _, result in runs])
    base = float(np.mean([result.base for _, result in runs]))
    recommended, reason = recommend({b: [r.final for r in g] for b, g in groups.items()}, base)
    chosen = [_region(result) for result in groups.get(recommended or 0.0, ())]
    on_bound = [r.share_on_lower_bound + r.share_on_upper_bound for r in chosen]
    return Response(
        task=task,
        held=1.0 - float(np.mean(on_bound or [0.0])),
        unit=runs[0][1].kl_unit,
        success=rank_correlation(budgets, np.array([result.final for _, result in runs])),
        kl=rank_correlation(budgets, kl),
        recommended=recommended,
        reason=reason,
    )


def recommend(success: Mapping[float, Sequence[float]], base: float) -> tuple[float | None, str]:
    """The smallest budget within one standard error of the best mean, and a sentence's part.

    One with fewer runs than others is left aside: those that are missing may have diverged.

    Args:
        success: of the runs, by budget.
        base: mean success of their bases, which a budget must better.
    """
    seeds = max(map(len, success.values()))
    means = {b: float(np.mean(rates)) for b, rates in success.items() if len(rates) == seeds}
    chosen, reason = _among(means, success, base)
    aside = [f"{budget:g}" for budget in success if budget not in means]
    return chosen, reason + (f"; {', '.join(aside)} left aside, for runs lack" if aside else "")


def _among(
    means: Mapping[float, float], success: Mapping[float, Sequence[float]], base: float
) -> tuple[float | None, str]:
    """Of budgets that have all runs."""
    best = max(means, key=lambda budget: (means[budget], -budget))
    if means[best] <= base:
        return None, f"the best, {percent(means[best])}, is not above the base's {percent(base)}"
    count = len(success[best])
    error = float(np.std(success[best], ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    chosen = min(b for b, mean in means.items() if mean > base and mean >= means[best] - error)
    if chosen == best:
        return chosen, f"the best mean success, {percent(means[best])}"
    return chosen, (
        f"{percent(means[chosen])}, the smallest within one standard error of the best, "
        f"{percent(means[best])} at {best:g}"
    )


def budget_table(groups: Mapping[float, Sequence[Result]], unit: str) -> str:
    """Success and KL of each budget, means over the seeds."""
    header = [f"budget ({unit})", "seeds", "base", "after offline", "after online"]
    header += ["realised KL", "KL / budget", "λ on a bound", "final λ"]
    rows = []
    for budget, group in groups.items():
        regions = [_region(result) for result in group]
        kl = float(np.mean([region.kl_mean for region in regions]))
        bound = [r.share_on_lower_bound + r.share_on_upper_bound for r in regions]
        rows.append(
            [
                f"{budget:g}",
                str(len(group)),
                mean_sd([result.base for result in group]),
                mean_sd([result.offline for result in group]),
                mean_sd([result.final for result in group]),
                f"{kl:.3g}",
                f"{kl / budget:.2f}",
                f"{np.mean(bound):.0%}",
                f"{np.mean([region.lam_final for region in regions]):.3g}",
            ]
        )
    return table(header, rows)


def row(result: Result) -> dict[str, object]:
    """A run's numbers, one a column."""
    region = _region(result)
    return result.row() | {
        "kl_budget": region.kl_budget,
        "kl_realised": region.kl_mean,
        "kl_unit": result.kl_unit,
        "lam_final": region.lam_final,
        "share_within": region.share_within,
    }


def _region(result: Result) -> TrustRegionSummary:
    assert result.trust_region is not None, "looked at in by_budget"
    return result.trust_region


def _draw(each: Response, groups: Mapping[float, Sequence[Result]], folder: Path) -> Path:
    paths = {budget: [r.metrics_path for r in group] for budget, group in groups.items()}
    path = folder / f"budgets_{each.task.replace('/', '_')}.png"
    return plot_budget_sweep(paths, path, kl_unit=each.unit)


def _write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _estimate(found: Estimate) -> str:
    low, high = found.interval.low, found.interval.high
    return f"{found.value:+.2f} (95% interval {low:+.2f} to {high:+.2f})"

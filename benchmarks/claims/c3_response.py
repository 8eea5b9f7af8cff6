"""Claim 3: success answers smoothly and in order to the KL budget.

    python recipes/sweep_kl.py --preset=claims_c3    # the runs
    python benchmarks/claims/c3_response.py --studies outputs/sweep_kl/claims_c3 \
        --keep docs/results/claims_c3 --output docs/figures/c3_response.png --page docs/claims.md

Reads the ``table.csv`` of one sweep or several, of different tasks. By its rule success is in order
on a task, rising or falling, where the interval of the rank correlation of budget and success
excludes zero, and smooth where no step from one budget to the next changes the mean success by more
than 20 points; the claim holds where both are so on all tasks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import write_claim
from claim_studies import from_studies, read_table

from vla_trqam.errors import UserError
from vla_trqam.report.figures import BASE, new_figure, save
from vla_trqam.report.formats import table
from vla_trqam.study.statistics import Estimate, rank_correlation, spearman
from vla_trqam.study.tables import mean_sd

LARGEST_STEP = 0.2
COLUMNS = ("task", "seed", "base", "after_online", "kl_budget", "kl_realised")


@dataclass(frozen=True)
class Ran:
    """A run of a sweep.

    Attributes:
        task: name.
        seed: of the training.
        base: success of the base.
        success: at the end.
        budget: of the KL.
        kl: that was realised, over the last half of the updates.
    """

    task: str
    seed: int
    base: float
    success: float
    budget: float
    kl: float


@dataclass(frozen=True)
class Task:
    """What the runs of a task say.

    Attributes:
        name: of the task.
        runs: on it, the same seeds at every budget.
    """

    name: str
    runs: Sequence[Ran]

    @property
    def by_budget(self) -> Mapping[float, list[Ran]]:
        """The runs of each budget, the smallest first."""
        budgets = sorted({ran.budget for ran in self.runs})
        return {b: [ran for ran in self.runs if ran.budget == b] for b in budgets}

    @property
    def means(self) -> list[float]:
        """Success by budget."""
        return [float(np.mean([r.success for r in runs])) for runs in self.by_budget.values()]

    @cached_property
    def correlation(self) -> Estimate:
        """Of budget and success, by ranks, over all runs."""
        pairs = np.array([(ran.budget, ran.success) for ran in self.runs])
        return rank_correlation(pairs[:, 0], pairs[:, 1])

    @property
    def correlations_of_seeds(self) -> list[float]:
        """The same of each seed's runs, whose base and data they share."""
        found = []
        for seed in sorted({ran.seed for ran in self.runs}):
            pairs = np.array([(r.budget, r.success) for r in self.runs if r.seed == seed])
            found.append(spearman(pairs[:, 0], pairs[:, 1]))
        return found

    @property
    def in_order(self) -> bool:
        """Whether the interval of the correlation excludes zero."""
        interval = self.correlation.interval
        return interval.low > 0.0 or interval.high < 0.0

    @property
    def largest_step(self) -> float:
        """Of the mean success, from one budget to the next."""
        return max(abs(b - a) for a, b in pairwise(self.means))

    @property
    def error_of_step(self) -> float:
        """The standard error of this step, by the seeds' scatter; NaN of one seed."""
        groups = [[r.success for r in runs] for runs in self.by_budget.values()]
        steps = [abs(float(np.mean(b) - np.mean(a))) for a, b in pairwise(groups)]
        one, other = list(pairwise(groups))[int(np.argmax(steps))]
        return math.sqrt(sum(_variance(each) / len(each) for each in (one, other)))

    @property
    def smooth(self) -> bool:
        """Whether no step is larger than the rule's."""
        return self.largest_step <= LARGEST_STEP


def _variance(values: Sequence[float]) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else math.nan


def read_studies(folders: Sequence[Path]) -> list[Task]:
    """The tasks of these sweeps.

    Raises:
        UserError: one is no finished sweep, two have the same run, or a task lacks one.
    """
    rows = [row for folder in folders for row in read_table(folder, COLUMNS)]
    found = [
        Ran(row["task"], int(row["seed"]), *(float(row[name]) for name in COLUMNS[2:]))
        for row in rows
    ]
    names = [(ran.task, ran.budget, ran.seed) for ran in found]
    if len(set(names)) < len(names):
        raise UserError("two of these studies have the same run: give studies of different tasks")
    tasks = [
        Task(n, [r for r in found if r.task == n]) for n in dict.fromkeys(r.task for r in found)
    ]
    for task in tasks:
        seeds = {tuple(sorted(r.seed for r in runs)) for runs in task.by_budget.values()}
        if len(seeds) > 1 or len(task.by_budget) < 2:
            raise UserError(
                f"claim 3 compares two budgets or more on equal seeds; those of {task.name} lack "
                "runs"
            )
    return tasks


def tell(tasks: Sequence[Task]) -> str:
    """Verdict and table."""
    ordered = [
        f"{t.name} ({'rising' if t.correlation.value > 0.0 else 'falling'})"
        for t in tasks
        if t.in_order
    ]
    smooth = [task.name for task in tasks if task.smooth]
    words = "holds" if len(ordered) == len(smooth) == len(tasks) else "does not hold"
    verdict = (
        f"**Claim 3 {words}** on {_listed([task.name for task in tasks])}: success is in order on "
        f"{_listed(ordered)}, and smooth on {_listed(smooth)}."
    )
    budgets = sorted({ran.budget for task in tasks for ran in task.runs})
    header = ["budget", *(f"{task.name}, %: KL, nats" for task in tasks)]
    rows = [[f"{b:g}", *(_cell(task.by_budget.get(b, [])) for task in tasks)] for b in budgets]
    rows += [
        ["the base", *(mean_sd(list({r.seed: r.base for r in t.runs}.values())) for t in tasks)],
        ["rank correlation (95%)", *(_interval(task.correlation) for task in tasks)],
        ["of each seed alone", *(_of_seeds(task) for task in tasks)],
        [
            "largest step ± standard error, points",
            *(f"{100 * task.largest_step:.0f} ± {100 * task.error_of_step:.0f}" for task in tasks),
        ],
    ]
    return f"{verdict}\n\n{table(header, rows)}"


def _cell(runs: Sequence[Ran]) -> str:
    if not runs:
        return ""
    return f"{mean_sd([r.success for r in runs])}: {np.mean([r.kl for r in runs]):.3g}"


def _of_seeds(task: Task) -> str:
    return ", ".join(f"{value:+.2f}" for value in task.correlations_of_seeds)


def _interval(found: Estimate) -> str:
    return f"{found.value:+.2f} ({found.interval.low:+.2f} to {found.interval.high:+.2f})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def draw(path: Path, tasks: Sequence[Task]) -> Path:
    """Success against the budget, a panel a task: seeds, their mean, and the base's."""
    figure, axes = new_figure("Success by KL budget", columns=len(tasks))
    for each, task in zip(axes, tasks, strict=True):
        for ran in task.runs:
            each.plot([ran.budget], [ran.success], "o", color="#0072B2", alpha=0.4)
        each.plot(list(task.by_budget), task.means, color="#0072B2", label="mean of the seeds")
        base = float(np.mean([ran.base for ran in task.runs]))
        each.axhline(base, color=BASE, linestyle="--", linewidth=1, label="base")
        each.set(xscale="log", title=task.name, xlabel="budget", ylim=(-0.02, 1.02))
        each.set_xticks(list(task.by_budget), [f"{b:g}" for b in task.by_budget], minor=False)
        each.minorticks_off()
    axes[0].set(ylabel="success rate")
    return save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no study of the claim's."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c3", about, arguments, from_studies(read_studies), tell, draw)


if __name__ == "__main__":
    sys.exit(main())

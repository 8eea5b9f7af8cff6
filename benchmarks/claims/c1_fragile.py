"""Claim 1: with a fixed temperature an imperfect critic costs success; a budget bears it.

    python benchmarks/claims/studies.py c1 --folder outputs/c1 --commands    # the runs
    python benchmarks/claims/c1_fragile.py --runs outputs/c1/* \
        --output docs/figures/c1_fragile.png --page docs/claims.md

Reads run folders, those that diverged too, and puts them side by side: what is imperfect about the
critic (few members, a part of the demonstrations, a noisy gradient), and the method.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import write_claim
from claim_runs import ClaimRun, grouped, mean_and_spread

from vla_trqam.errors import UserError
from vla_trqam.report.figures import CYCLE, new_figure, save
from vla_trqam.report.formats import table

GROWN = 10.0
"""The adjoint loss has diverged where its last tenth is so many times its middle, or not finite.

Not its first: a critic begins flat, and the loss grows with its slope in every run.
"""


def method_label(run: ClaimRun) -> str:
    """``TRQAM``, or ``QAM β=3``."""
    name = str(run.method["type"]).upper()
    beta = run.method.get("inverse_temperature")
    return name if beta is None else f"{name} β={beta:g}"


def imperfection(run: ClaimRun) -> str:
    """What is wrong with its critic."""
    critic, data = run.config["critic"], run.config["dataset"]
    parts = [f"{critic['ensemble_size']} critics"]
    if data.get("num_demos") is not None:
        parts.append(f"{data['num_demos']} demos")
    if critic.get("gradient_noise"):
        parts.append(f"noise {critic['gradient_noise']:g}")
    return ", ".join(parts)


def task_of(run: ClaimRun) -> str:
    """Its data's name, or what its report's title ends with."""
    path = run.config["dataset"].get("path")
    return Path(path).stem if path else "lift"


@dataclass(frozen=True)
class Group:
    """The seeds of one method with one critic in one task.

    Attributes:
        task: name.
        critic: what is imperfect.
        method: label.
        runs: a run a seed.
    """

    task: str
    critic: str
    method: str
    runs: Sequence[ClaimRun]

    @property
    def gains(self) -> list[float]:
        """Of those that finished."""
        return [run.gain for run in self.runs if run.gain is not None]

    @property
    def below(self) -> int:
        """Runs that end below their base, or do not end."""
        return sum(run.gain is None or run.gain < 0.0 for run in self.runs)

    @property
    def growth(self) -> float:
        """Largest growth of the adjoint loss over the seeds, last tenth over the middle."""
        return max(_growth(run) for run in self.runs)

    @property
    def diverged(self) -> int:
        """Runs that did not end, or whose adjoint loss grew without bound."""
        return sum(not run.finished or _growth(run) > GROWN for run in self.runs)

    def row(self) -> list[str]:
        """Its cells."""
        bases = [run.base for run in self.runs if run.base is not None]
        tuned = [run.tuned for run in self.runs if run.tuned is not None]
        worst = [run.worst for run in self.runs if np.isfinite(run.worst)]
        kls = [run.tenth("kl_estimate", 1.0) for run in self.runs]
        return [
            *(self.task, self.critic, self.method, str(len(self.runs))),
            *(mean_and_spread(bases), mean_and_spread(tuned)),
            f"{100 * min(worst):.0f}" if worst else "-",
            *(f"{self.below}", f"{np.mean(kls):.2g}", f"{self.growth:.3g}", f"{self.diverged}"),
        ]


HEADER = (
    *("task", "critic", "method", "seeds", "base, %", "tuned, %", "worst evaluation, %"),
    *("below base", "KL", "adjoint loss, end over middle", "diverged"),
)


def _growth(run: ClaimRun) -> float:
    losses = run.values("adjoint_loss")
    if not np.isfinite(losses).all():
        return float("inf")
    return run.tenth("adjoint_loss", 1.0) / run.tenth("adjoint_loss", 0.5)


def groups_of(runs: Sequence[ClaimRun]) -> list[Group]:
    """Runs by task, critic and method."""
    parts = grouped(runs, lambda run: (task_of(run), imperfection(run), method_label(run)))
    ordered = sorted(parts.items())
    return [Group(task, critic, method, own) for (task, critic, method), own in ordered]


def verdict(groups: Sequence[Group]) -> str:
    """Per method how many runs were lost, and which temperatures are worse than the budget."""
    lost, worst = {}, {}
    for label, members in grouped_by_method(groups).items():
        lost[label] = sum(group.below for group in members), sum(len(g.runs) for g in members)
        worst[label] = min(float(np.mean(g.gains)) if g.gains else -1.0 for g in members)
    if "TRQAM" not in lost or len(lost) < 2:
        raise UserError("claim 1 compares TRQAM's runs with others: give runs of both")
    said = ", ".join(
        f"{label} {below} of {count} (worst mean gain {100 * worst[label]:+.0f} points)"
        for label, (below, count) in lost.items()
    )
    others = [label for label in lost if label != "TRQAM"]
    fragile = [
        label
        for label in others
        if lost[label][0] > lost["TRQAM"][0] and worst[label] < worst["TRQAM"]
    ]
    level = [label for label in others if label not in fragile]
    holds = f"holds for {', '.join(fragile)}" if fragile else "does not hold"
    rest = f", not for {', '.join(level)}" if fragile and level else ""
    return f"**Claim 1 {holds}{rest}.** Runs that end below their base or not at all: {said}."


def grouped_by_method(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Of all tasks and critics."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.method, []).append(group)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "TRQAM", item[0])))


def draw(path: Path, groups: Sequence[Group]) -> Path:
    """The mean gain of every method by the critic, a panel a task."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    figure, panels = new_figure(
        "What an imperfect critic costs", columns=len(tasks), size=(6.4 * len(tasks), 4.2)
    )
    for axes, task in zip(panels, tasks, strict=True):
        own = [group for group in groups if group.task == task]
        critics = list(dict.fromkeys(group.critic for group in own))
        for index, (label, members) in enumerate(grouped_by_method(own).items()):
            places = [critics.index(g.critic) + 0.12 * index for g in members]
            for place, group in zip(places, members, strict=True):
                axes.plot([place] * len(group.gains), group.gains, "o", ms=3, color=CYCLE[index])
            means = [float(np.mean(g.gains)) if g.gains else math.nan for g in members]
            axes.plot(places, means, "_", ms=12, color=CYCLE[index], label=label)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(critics)), critics, rotation=20, fontsize="small")
        axes.set_title(task)
    panels[0].set_ylabel("success gained over the base")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def tell(groups: Sequence[Group]) -> str:
    """Verdict and table."""
    return f"{verdict(groups)}\n\n{table(HEADER, [group.row() for group in groups])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no run."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c1", about, arguments, groups_of, tell, draw)


if __name__ == "__main__":
    sys.exit(main())

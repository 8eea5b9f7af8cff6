"""Claim 1: with a fixed temperature an imperfect critic costs success; a budget bears it.

    python benchmarks/claims/studies.py c1 --folder outputs/c1 --commands    # the runs
    python benchmarks/claims/c1_fragile.py --runs outputs/c1/* \
        --output docs/figures/c1_fragile.png --page docs/claims.md

Reads run folders, those that diverged too, and puts them side by side: what is imperfect about the
critic (few members, a part of the demonstrations, a noisy gradient), and the method. A temperature
loses where its runs gain less than TRQAM's of the same task, critic and seed. The runs of a
seed share their base, and critics much of their data, so they are no independent pairs: each seed's
mean over its critics counts once, by Student's t, corrected for the number of temperatures (Holm).
It is the critic's fault where they also lose more of their gain than TRQAM from the preset's critic
to the imperfect ones. The claim holds for a temperature of which both are told.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import write_claim
from claim_runs import ClaimRun, from_runs, mean_and_spread
from numpy.typing import NDArray

from vla_trqam.errors import UserError
from vla_trqam.report.figures import CYCLE, new_figure, save
from vla_trqam.report.formats import table
from vla_trqam.study.statistics import CONFIDENCE, holm, mean_interval, mean_p

Cell = tuple[str, str, int]
"""Task, critic, seed."""
OURS = "TRQAM"
PRESET, BETTER = "4 critics", "10 critics"
"""The critic that the presets have, and the one that is no imperfection of it."""
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
class Gain:
    """What a run won.

    Attributes:
        run: of a method with a critic in a task.
        gain: success over the base; all of the base's is lost by what diverged.
    """

    run: ClaimRun
    gain: float

    @property
    def cell(self) -> Cell:
        """Task, critic and seed: runs of one differ by their method alone."""
        return task_of(self.run), imperfection(self.run), self.run.seed

    @property
    def diverged(self) -> bool:
        """Whether it ended by that, or its adjoint loss grew without bound."""
        return self.run.diverged or _growth(self.run) > GROWN


def gains_of(runs: Sequence[ClaimRun]) -> list[Gain]:
    """What each run won.

    Raises:
        UserError: nothing tells the base of one that diverged.
    """
    bases = {(task_of(run), run.seed): run.base for run in runs if run.base is not None}
    found = []
    for run in runs:
        base = bases.get((task_of(run), run.seed))
        if base is None:
            raise UserError(f"the runs of {task_of(run)}, seed {run.seed} all diverged")
        found.append(Gain(run, -base if run.gain is None else run.gain))
    return found


@dataclass(frozen=True)
class Group:
    """The seeds of one method with one critic in one task.

    Attributes:
        task: name.
        critic: what is imperfect.
        method: label.
        members: a run a seed.
    """

    task: str
    critic: str
    method: str
    members: Sequence[Gain]

    @property
    def below(self) -> int:
        """Runs that end below their base, or do not end."""
        return sum(each.gain < 0.0 for each in self.members)

    @property
    def growth(self) -> float:
        """Largest growth of the adjoint loss over the seeds, last tenth over the middle."""
        return max(_growth(each.run) for each in self.members)

    @property
    def diverged(self) -> int:
        """Runs that did."""
        return sum(each.diverged for each in self.members)

    def row(self) -> list[str]:
        """Its cells."""
        runs = [each.run for each in self.members]
        bases = [run.base for run in runs if run.base is not None]
        tuned = [run.tuned for run in runs if run.tuned is not None]
        worst = [run.worst for run in runs if np.isfinite(run.worst)]
        kls = [run.tenth("kl_estimate", 1.0) for run in runs]
        return [
            *(self.task, self.critic, self.method, str(len(runs))),
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
    parts: dict[tuple[str, str, str], list[Gain]] = {}
    for each in gains_of(runs):
        task, critic, _ = each.cell
        parts.setdefault((task, critic, method_label(each.run)), []).append(each)
    groups = [Group(*place, own) for place, own in parts.items()]
    return sorted(groups, key=lambda group: _order(group.members[0].run))


def _order(run: ClaimRun) -> tuple[object, ...]:
    """By task and critic, fewer critics first; ours before the temperatures, smaller ones first."""
    critic, data = run.config["critic"], run.config["dataset"]
    wrong = data.get("num_demos") or 0, critic.get("gradient_noise") or 0.0
    beta = run.method.get("inverse_temperature", 0.0)
    return task_of(run), *wrong, critic["ensemble_size"], method_label(run) != OURS, beta


def verdict(groups: Sequence[Group]) -> str:
    """Which temperatures are worse than the budget in the same tasks, critics and seeds.

    Raises:
        UserError: a method has no run where another has one, or there is nothing to compare.
    """
    gains = {
        label: {each.cell: each.gain for group in members for each in group.members}
        for label, members in grouped_by_method(groups).items()
    }
    ours = gains.pop(OURS, {})
    if not ours or not gains:
        raise UserError("claim 1 compares TRQAM's runs with others: give runs of both")
    for label, own in gains.items():
        if alone := sorted(own.keys() ^ ours.keys()):
            task, critic, seed = alone[0]
            raise UserError(
                f"one of {OURS} and {label} has no run on {task}, {critic}, seed {seed}"
            )
    level = _beaten({label: seed_means(ours, own) for label, own in gains.items()})
    losses = {label: imperfection_costs(own) for label, own in gains.items()}
    budget = imperfection_costs(ours)
    by_critic = _beaten({label: loss - budget for label, loss in losses.items()})
    held = [label for label in gains if level[label].beaten and by_critic[label].beaten]
    said = [_said(OURS, ours.values())]
    said += [f"{_said(label, gains[label].values())}, {level[label]}" for label in gains]
    lost = [f"{OURS} {_points(budget)}"]
    lost += [f"{label} {_points(losses[label])}, {by_critic[label]}" for label in gains]
    return (
        f"**Claim 1 {'holds for ' + ', '.join(held) if held else 'does not hold'}.** Less "
        f"gain than {OURS}'s over all critics: {_beaten_ones(level)}; more of it lost by a "
        f"critic's imperfection: {_beaten_ones(by_critic)}. Mean gains over {len(ours)} runs each: "
        f"{'; '.join(said)}. Points of gain lost from the preset's critic to the imperfect ones: "
        f"{'; '.join(lost)}. The 95% intervals are Student's over the {len(budget)} seeds of each "
        "task, each a mean over its critics, which share a base; p by Holm."
    )


@dataclass(frozen=True)
class Lead:
    """How far TRQAM is ahead of a temperature.

    Attributes:
        differences: (R, M), a mean over critics for R seeds of M tasks.
        p: that their mean is 0, corrected for the number of temperatures.
    """

    differences: NDArray[np.float64]
    p: float

    @property
    def beaten(self) -> bool:
        """Whether it is told to be ahead."""
        return self.p < 1 - CONFIDENCE and self.differences.mean() > 0.0

    def __str__(self) -> str:
        low, high = (100 * end for end in astuple(mean_interval(self.differences)))
        return (
            f"of which {OURS} is ahead by {_points(self.differences)} ({low:.0f} to {high:.0f}), "
            f"p = {self.p:.2g}"
        )


def _beaten(differences: Mapping[str, NDArray[np.float64]]) -> dict[str, Lead]:
    tests = holm([mean_p(each) for each in differences.values()])
    pairs = zip(differences.items(), tests, strict=True)
    return {label: Lead(each, p) for (label, each), p in pairs}


def _beaten_ones(leads: Mapping[str, Lead]) -> str:
    return ", ".join(label for label, lead in leads.items() if lead.beaten) or "none"


def _points(differences: NDArray[np.float64]) -> str:
    return str(round(100 * float(differences.mean())))


def imperfection_costs(gains: Mapping[Cell, float]) -> NDArray[np.float64]:
    """(R, M): the gain with the preset's critic less the mean of those with imperfect ones.

    Raises:
        UserError: a task or seed has only one of the two.
    """
    preset = {cell[::2]: gain for cell, gain in gains.items() if cell[1] == PRESET}
    imperfect = {cell: gain for cell, gain in gains.items() if cell[1] not in (PRESET, BETTER)}
    if {cell[::2] for cell in imperfect} != preset.keys():
        raise UserError(
            f"claim 1 compares imperfect critics with the preset's ({PRESET}) on every task and "
            "seed: give runs of both"
        )
    return seed_means({cell: preset[cell[::2]] for cell in imperfect}, imperfect)


def seed_means(ours: Mapping[Cell, float], others: Mapping[Cell, float]) -> NDArray[np.float64]:
    """(R, M): by how much ours gain more, of R seeds of M tasks, each a mean over its critics.

    Raises:
        UserError: the tasks have different seeds.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for (task, critic, seed), gain in ours.items():
        more = gain - others[task, critic, seed]
        found.setdefault(task, {}).setdefault(seed, []).append(more)
    if len({frozenset(seeds) for seeds in found.values()}) > 1:
        raise UserError("claim 1 wants the same seeds of each task")
    return np.array(
        [[np.mean(found[task][s]) for s in sorted(found[task])] for task in sorted(found)]
    ).T


def _said(label: str, gains: Collection[float]) -> str:
    below = sum(gain < 0.0 for gain in gains)
    return f"{label} {100 * np.mean(list(gains)):+.0f} points ({below} below their base)"


def grouped_by_method(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Of all tasks and critics."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.method, []).append(group)
    return found


def draw(path: Path, groups: Sequence[Group]) -> Path:
    """The mean gain of every method by the critic, a panel a task."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    figure, panels = new_figure(
        "What an imperfect critic costs", columns=len(tasks), size=(7.4 * len(tasks), 4.2)
    )
    for axes, task in zip(panels, tasks, strict=True):
        own = [group for group in groups if group.task == task]
        critics = list(dict.fromkeys(group.critic for group in own))
        for index, (label, members) in enumerate(grouped_by_method(own).items()):
            places = [critics.index(g.critic) + 0.15 * index for g in members]
            gains = [[each.gain for each in group.members] for group in members]
            for place, each in zip(places, gains, strict=True):
                axes.plot([place] * len(each), each, "o", ms=3, color=CYCLE[index])
            means = [float(np.mean(each)) for each in gains]
            axes.plot(places, means, "_", ms=12, color=CYCLE[index], label=label)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(critics)), critics, rotation=20, fontsize="small")
        axes.set_title(task)
        # Beside the points, of which it would hide some.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    panels[0].set_ylabel("success gained over the base")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def tell(groups: Sequence[Group]) -> str:
    """Verdict and table."""
    return f"{verdict(groups)}\n\n{table(HEADER, [group.row() for group in groups])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no run."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c1", about, arguments, from_runs(groups_of), tell, draw)


if __name__ == "__main__":
    sys.exit(main())

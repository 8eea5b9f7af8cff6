"""Claim 6 on tasks: what scheme, number of flow steps and adjoint do to success.

    python benchmarks/claims/studies.py c6 --folder outputs/c6 --commands    # the runs
    python benchmarks/claims/c6_tasks.py --runs outputs/c6/* \
        --output docs/figures/c6_tasks.png --page docs/claims.md

Reads run folders. Two runs of a task, a seed and a number of steps begin with the same base, so
that their gains are compared in pairs: the posterior chain's less shifted Euler's, the lean
adjoint's less the scalar one's. Each seed of a task counts once, a mean over the pairs that differ
in the other of the two; the intervals are Student's over the seeds around each task's mean, p is
corrected for the number of comparisons (Holm).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import above  # noqa: F401 (benchmarks/)
import numpy as np
from chain_figure import COLORS
from claim_page import write_claim
from claim_runs import ClaimRun, from_runs, grouped, mean_and_spread
from numpy.typing import NDArray

from vla_trqam.errors import UserError
from vla_trqam.report.figures import new_figure, save
from vla_trqam.report.formats import table
from vla_trqam.study.statistics import CONFIDENCE, holm, mean_interval, mean_p

LABELS = {"posterior": "posterior", "shifted_euler": "shifted Euler"}
SCHEMES = tuple(LABELS)
ADJOINTS = ("lean", "scalar")
HEADER = (
    *("task", "K", "chain", "adjoint", "seeds", "base, %", "tuned, %", "gain, points"),
    *("KL over budget", "λ at the end"),
)


@dataclass(frozen=True)
class Place:
    """What of a run is compared.

    Attributes:
        task: name of its data.
        steps: K.
        scheme: of its chain.
        adjoint: lean or scalar.
    """

    task: str
    steps: int
    scheme: str
    adjoint: str

    @classmethod
    def of(cls, run: ClaimRun) -> Place:
        """By its settings."""
        data = run.config["dataset"].get("path")
        method = run.method
        steps = int(run.config["policy"]["num_flow_steps"])
        task = Path(data).stem if data else "lift"
        return cls(task, steps, str(method["scheme"]), str(method["adjoint"]))


Gains = Mapping[tuple[Place, int], float]
"""By place and seed."""


def gains_of(runs: Sequence[ClaimRun]) -> Gains:
    """What every run won.

    Raises:
        UserError: a run diverged, there are two of a place and seed, or one is missing of both
            chains with the adjoints that there are at its number of steps.
    """
    found: dict[tuple[Place, int], float] = {}
    for run in runs:
        key = Place.of(run), run.seed
        if run.gain is None:
            raise UserError(f"the run in {run.folder} diverged: claim 6 has no number for it")
        if key in found:
            raise UserError(f"{run.folder} is a second run of {key[0]}, seed {run.seed}")
        found[key] = run.gain
    for place, seed in found:
        for scheme in SCHEMES:
            for adjoint in adjoints_at(place.steps, found):
                other = Place(place.task, place.steps, scheme, adjoint)
                if (other, seed) not in found:
                    raise UserError(f"claim 6 lacks a run: {other}, seed {seed}")
    return found


def adjoints_at(steps: int, gains: Gains) -> list[str]:
    """Those with which the chains of so many steps were run."""
    there = {place.adjoint for place, _ in gains if place.steps == steps}
    return [adjoint for adjoint in ADJOINTS if adjoint in there]


@dataclass(frozen=True)
class Comparison:
    """One choice against the other, at a number of steps.

    Attributes:
        said: what is compared.
        steps: K.
        tasks: names, as the columns of ``differences``.
        differences: (R, M), R seeds of M tasks.
    """

    said: str
    steps: int
    tasks: Sequence[str]
    differences: NDArray[np.float64]


def comparisons(gains: Gains) -> Iterator[Comparison]:
    """Scheme and adjoint, each at every number of steps at which both were run.

    Raises:
        UserError: the tasks have different seeds.
    """
    tasks = list(dict.fromkeys(place.task for place, _ in gains))
    one, other = SCHEMES
    ours, theirs = LABELS.values()
    for steps in sorted({place.steps for place, _ in gains}):
        adjoints = adjoints_at(steps, gains)
        pairs = {f"{ours} less {theirs}": [((one, a), (other, a)) for a in adjoints]}
        if len(adjoints) > 1:
            lean, scalar = ADJOINTS
            pairs[f"{lean} less {scalar}"] = [((s, lean), (s, scalar)) for s in SCHEMES]
        for said, kinds in pairs.items():
            yield Comparison(said, steps, tasks, _table(gains, tasks, steps, kinds))


Kind = tuple[str, str]
"""Scheme and adjoint."""


def _table(
    gains: Gains, tasks: Sequence[str], steps: int, pairs: Sequence[tuple[Kind, Kind]]
) -> NDArray[np.float64]:
    def ahead(task: str, seed: int) -> float:
        places = [(Place(task, steps, *a), Place(task, steps, *b)) for a, b in pairs]
        return float(np.mean([gains[one, seed] - gains[other, seed] for one, other in places]))

    seeds = {t: sorted({s for p, s in gains if (p.task, p.steps) == (t, steps)}) for t in tasks}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise UserError("claim 6 wants the same seeds of each task")
    return np.array([[ahead(task, seed) for seed in seeds[task]] for task in tasks]).T


def verdict(found: Sequence[Comparison]) -> str:
    """A line a comparison, with what each task says."""
    corrected = holm([mean_p(each.differences) for each in found])
    lines = []
    for each, p in zip(found, corrected, strict=True):
        low, high = (100 * end for end in astuple(mean_interval(each.differences)))
        own = ", ".join(
            f"{task} {100 * mean:+.1f}"
            for task, mean in zip(each.tasks, each.differences.mean(axis=0), strict=True)
        )
        told = "told apart" if p < 1 - CONFIDENCE else "not told apart"
        lines.append(
            f"- K = {each.steps}, {each.said}: {100 * each.differences.mean():+.1f} points "
            f"({low:.1f} to {high:.1f}), p = {p:.2g}, **{told}** ({own})"
        )
    seeds = len(found[0].differences)
    return (
        f"Points of gain, over {len(found[0].tasks)} tasks of {seeds} seeds; 95% intervals, p by "
        f"Holm over the {len(found)} comparisons:\n\n" + "\n".join(lines)
    )


def rows_of(runs: Sequence[ClaimRun]) -> list[list[str]]:
    """A row a place."""
    rows = []
    for place, own in sorted(grouped(runs, Place.of).items(), key=lambda each: astuple(each[0])):
        bases, tuned = ([cast("float", getattr(r, n)) for r in own] for n in ("base", "tuned"))
        budgets = [float(run.method["kl_budget"]) for run in own]
        kept = [run.tenth("kl_estimate", 1.0) / b for run, b in zip(own, budgets, strict=True)]
        gains = [t - b for t, b in zip(tuned, bases, strict=True)]
        rows.append(
            [
                *(place.task, str(place.steps), LABELS[place.scheme], place.adjoint, str(len(own))),
                *(mean_and_spread(bases), mean_and_spread(tuned), mean_and_spread(gains)),
                f"{np.mean(kept):.2f}",
                f"{np.mean([run.tenth('lam', 1.0) for run in own]):.3g}",
            ]
        )
    return rows


def tell(runs: Sequence[ClaimRun]) -> str:
    """Verdict and table."""
    return f"{verdict(list(comparisons(gains_of(runs))))}\n\n{table(HEADER, rows_of(runs))}"


def draw(path: Path, runs: Sequence[ClaimRun]) -> Path:
    """The gain against K, a panel a task: every seed a point, the mean a line."""
    gains = gains_of(runs)
    tasks = list(dict.fromkeys(place.task for place, _ in gains))
    title = "What the chain and the adjoint do to success"
    figure, panels = new_figure(title, columns=len(tasks), size=(4.6 * len(tasks), 3.8))
    for axes, task in zip(panels, tasks, strict=True):
        ks = sorted({place.steps for place, _ in gains if place.task == task})
        kinds = [(scheme, adjoint) for scheme in SCHEMES for adjoint in ADJOINTS]
        for number, (scheme, adjoint) in enumerate(kinds):
            there = [k for k in ks if adjoint in adjoints_at(k, gains)]
            own = [
                [g for (p, _), g in gains.items() if p == Place(task, k, scheme, adjoint)]
                for k in there
            ]
            at = [ks.index(k) + 0.08 * (number - 1.5) for k in there]
            line: dict[str, Any] = {"color": COLORS[LABELS[scheme]]}
            for x, points in zip(at, own, strict=True):
                axes.plot([x] * len(points), points, "o", ms=3, **line)
            style = "-" if adjoint == "lean" else "--"
            label = f"{LABELS[scheme]}, {adjoint}"
            axes.plot(at, [np.mean(each) for each in own], style, label=label, **line)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(ks)), [f"K = {k}" for k in ks])
        axes.set_title(task, fontsize="medium")
    panels[0].set_ylabel("success gained over the base")
    panels[-1].legend(fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no run."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c6_tasks", about, arguments, from_runs(list), tell, draw)


if __name__ == "__main__":
    sys.exit(main())

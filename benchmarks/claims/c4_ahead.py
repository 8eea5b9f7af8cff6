"""Claim 4: over all tasks TRQAM is ahead of the other methods.

    python recipes/compare.py --preset=claims_c4    # the runs
    python benchmarks/claims/c4_ahead.py --studies outputs/compare/claims_c4 \
        --keep docs/results/claims_c4 --output docs/figures/c4_ahead.png --page docs/claims.md

Reads the ``table.csv`` of one study or several, of different tasks, and says what they have in
common: the interquartile mean over tasks and seeds, and which methods these seeds tell apart.
``--keep`` copies each study's page, table, settings and pictures, by the names of its tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
import numpy as np
from claim_page import write_claim
from claim_studies import from_studies, read_table

from vla_trqam.errors import UserError
from vla_trqam.report.formats import percent, table
from vla_trqam.study.pictures import plot_aggregate
from vla_trqam.study.statistics import (
    CONFIDENCE,
    Estimate,
    Pair,
    Scores,
    compare_pairs,
    holm,
    improvements,
    interquartile_means,
    performance_profiles,
)
from vla_trqam.study.tables import estimate, mean_sd

OURS = "trqam"
STAGES = {"after_offline": "after the offline updates", "after_online": "after the online ones"}


@dataclass(frozen=True)
class Ran:
    """A run of a study.

    Attributes:
        task: name.
        method: label.
        seed: of the training.
        rates: success by column: "base", "after_offline", "after_online".
    """

    task: str
    method: str
    seed: int
    rates: Mapping[str, float]


def read_studies(folders: Sequence[Path]) -> list[Ran]:
    """All runs of these studies.

    Raises:
        UserError: one has no table, or two have the same run.
    """
    found = [ran for folder in folders for ran in _read(folder)]
    names = [(ran.task, ran.method, ran.seed) for ran in found]
    if len(set(names)) < len(names):
        raise UserError("two of these studies have the same run: give studies of different tasks")
    return found


def _read(folder: Path) -> Iterator[Ran]:
    for row in read_table(folder, ("task", "method", "seed", "base", *STAGES)):
        rates = {name: float(row[name]) for name in ("base", *STAGES)}
        yield Ran(row["task"], row["method"], int(row["seed"]), rates)


def scores_of(runs: Sequence[Ran], stage: str) -> Scores:
    """Success by method, (R, M), of R seeds and M tasks, of the methods that have all of them.

    Raises:
        UserError: the method of the claim lacks a run, or no other has all.
    """
    tasks = list(dict.fromkeys(ran.task for ran in runs))
    seeds = sorted({ran.seed for ran in runs})
    found = {(ran.method, ran.task, ran.seed): ran.rates[stage] for ran in runs}
    scores = {}
    for method in dict.fromkeys(ran.method for ran in runs):
        keys = [[(method, task, seed) for task in tasks] for seed in seeds]
        if all(key in found for row in keys for key in row):
            scores[method] = np.array([[found[key] for key in row] for row in keys])
    if OURS not in scores or len(scores) < 2:
        raise UserError(f"claim 4 compares {OURS} with others on equal tasks and seeds: give all")
    return scores


def verdict(stage: str, means: Mapping[str, Estimate], pairs: Sequence[Pair]) -> str:
    """Who has the largest mean, and whom of the others these seeds tell from ours."""
    ranked = sorted(means, key=lambda name: -means[name].value)
    own = [pair for pair in pairs if OURS in (pair.one, pair.other)]
    corrected = holm([pair.p for pair in own])
    told = [pair for pair, p in zip(own, corrected, strict=True) if p < 1 - CONFIDENCE]
    behind = [_other(pair) for pair in told if _gain(pair) > 0.0]
    ahead = [_other(pair) for pair in told if _gain(pair) < 0.0]
    place = ranked.index(OURS) + 1
    holds = len(behind) == len(own)
    words = "holds" if holds else "first, not told apart" if place == 1 else "does not hold"
    return (
        f"- **TRQAM is ahead {STAGES[stage]}: {words}** (place {place} of {len(ranked)} by the "
        f"interquartile mean; these seeds tell it to be better than {_listed(behind)}, worse than "
        f"{_listed(ahead)})."
    )


def _gain(pair: Pair) -> float:
    """By how much ours is better."""
    return pair.difference if pair.one == OURS else -pair.difference


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _other(pair: Pair) -> str:
    return pair.other if pair.one == OURS else pair.one


def tell(runs: Sequence[Ran]) -> str:
    """Verdicts and tables."""
    verdicts, columns, beaten = [], {}, {}
    for stage in STAGES:
        scores = scores_of(runs, stage)
        columns[stage], pairs = interquartile_means(scores), compare_pairs(scores)
        beaten[stage] = improvements(scores, OURS)
        verdicts.append(verdict(stage, columns[stage], pairs))
        verdicts.append(_every_pair(stage, pairs))
    tasks = list(dict.fromkeys(ran.task for ran in runs))
    seeds = len({ran.seed for ran in runs})
    verdicts.append(_limit(len(tasks) * seeds, len(columns["after_online"])))
    return "\n\n".join(
        [
            "\n".join(verdicts),
            f"Success in percent, means of {seeds} seeds ± standard deviation, after the offline "
            "updates → after the online ones:",
            table(
                [
                    *("method", *tasks, "mean", "interquartile mean (95%)"),
                    f"P({OURS} is better) (95%)",
                ],
                _rows(runs, tasks, columns, beaten),
            ),
        ]
    )


def _every_pair(stage: str, pairs: Sequence[Pair]) -> str:
    """Whom these seeds tell apart where every two methods are compared, ours or not."""
    apart = [f"{pair.one} and {pair.other}" for pair in pairs if pair.told_apart]
    return (
        f"- Of all {len(pairs)} pairs of methods (by Holm over all of them) these seeds tell apart "
        f"{STAGES[stage]}: {_listed(apart)}."
    )


def _limit(runs: int, methods: int) -> str:
    """What could come of the tests at best."""
    others, one = methods - 1, 2 / 2**runs
    every = methods * others // 2
    ours, all_pairs = (f"{min(1.0, count * one):.2g}" for count in (others, every))
    return (
        f"- The tests flip the signs of TRQAM's differences in {runs} runs a method, so that none "
        f"has a p below {one:.2g}, {others} comparisons none below {ours} (by Holm), and all "
        f"{every} pairs of methods none below {all_pairs}."
    )


def _rows(
    runs: Sequence[Ran],
    tasks: Sequence[str],
    columns: Mapping[str, Mapping[str, Estimate]],
    beaten: Mapping[str, Mapping[str, Estimate]],
) -> list[list[str]]:
    bases = [_mean({ran.seed: ran.rates["base"] for ran in runs if ran.task == t}) for t in tasks]
    rows = [["the base", *bases, "", "", ""]]
    for method in columns["after_offline"]:
        mine = [ran for ran in runs if ran.method == method]
        cells = [
            " → ".join(
                _mean({ran.seed: ran.rates[stage] for ran in mine if ran.task == task})
                for stage in STAGES
            )
            for task in tasks
        ]
        plain = " → ".join(
            percent(float(np.mean([ran.rates[stage] for ran in mine]))) for stage in STAGES
        )
        means = " → ".join(estimate(columns[stage][method]) for stage in STAGES)
        own = [found[method] for found in beaten.values() if method in found]
        rows.append([method, *cells, plain, means, " → ".join(map(estimate, own))])
    return rows


def _mean(by_seed: Mapping[int, float]) -> str:
    return mean_sd(list(by_seed.values()))


def draw(path: Path, runs: Sequence[Ran]) -> Path:
    """Means, probabilities of improvement and performance profiles after the online updates."""
    found = scores_of(runs, "after_online")
    scores = {OURS: found[OURS], **found}
    tasks = ", ".join(dict.fromkeys(ran.task for ran in runs))
    return plot_aggregate(
        f"{tasks}: after the online updates",
        interquartile_means(scores),
        improvements(scores, OURS),
        performance_profiles(scores),
        path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what is no study of the claim's."""
    about = (__doc__ or "").split("\n")[0]
    return write_claim("c4", about, arguments, from_studies(read_studies), tell, draw)


if __name__ == "__main__":
    sys.exit(main())

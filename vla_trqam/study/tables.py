"""The tables of a comparison, as Markdown for a reader and as CSV for a program."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_trqam.files import written_whole
from vla_trqam.report.formats import percent, points, points_interval, table
from vla_trqam.study.results import Result
from vla_trqam.study.settings import StudyTask
from vla_trqam.study.statistics import Estimate, Pair, Scores
from vla_trqam.study.trials import Trials


def success_table(results: Sequence[Result]) -> str:
    """Every task and variant: means over the seeds and their standard deviation."""
    header = ["task", "method", "seeds", "base", "after offline", "after online", "gain (points)"]
    header += ["updates/s", "environment steps"]
    rows = [
        [
            task,
            label,
            str(len(group)),
            mean_sd([r.base for r in group]),
            mean_sd([r.offline for r in group]),
            mean_sd([r.final for r in group]),
            points(float(np.mean([r.final - r.base for r in group]))),
            f"{np.mean([r.updates_per_s for r in group]):.0f}",
            f"{np.mean([r.env_steps for r in group]):.0f}",
        ]
        for task, label, group in grouped(results)
    ]
    return table(header, rows)


def aggregate_table(means: Mapping[str, Estimate], beaten: Mapping[str, Estimate]) -> str:
    """The interquartile mean of each variant, and how often the first one beats it."""
    first = next(iter(means))
    rows = []
    for label, found in means.items():
        against = beaten.get(label)
        rows.append([label, estimate(found), "" if against is None else estimate(against)])
    return table(["", "interquartile mean (95%)", f"P({first} is better) (95%)"], rows)


def pairs_table(pairs: Sequence[Pair]) -> str:
    """Every two variants, the largest differences first."""
    rows = [
        [
            f"{pair.one} - {pair.other}",
            points(pair.difference),
            points_interval(pair.interval),
            f"{pair.p:.2g}",
            f"{pair.corrected_p:.2g}",
            "yes" if pair.told_apart else "no",
        ]
        for pair in sorted(pairs, key=lambda pair: -abs(pair.difference))
    ]
    header = ["", "difference (points)", "95% interval", "p", "p, corrected", "told apart"]
    return table(header, rows)


def not_told_apart(pairs: Sequence[Pair]) -> str:
    """The line that says which variants these seeds cannot tell apart."""
    same = [f"{pair.one} and {pair.other}" for pair in pairs if not pair.told_apart]
    if not pairs:
        return "There is one method: nothing to tell apart."
    if not same:
        return "These seeds tell every two methods apart."
    if len(same) == len(pairs):
        return "**These seeds tell no two methods apart.**"
    return f"**Not told apart by these seeds:** {', '.join(same)}."


def missing_line(results: Sequence[Result], expected: Iterable[tuple[str, str, int]]) -> str:
    """Which runs are not there; empty when all are."""
    there = {(r.task, r.label, r.seed) for r in results}
    absent = [f"{task}/{label}_s{seed}" for task, label, seed in expected]
    known = {f"{task}/{label}_s{seed}" for task, label, seed in there}
    left = [name for name in absent if name not in known]
    if not left:
        return ""
    return f"**Missing, and left out of what is below:** {', '.join(left)}."


def complete_scores(
    results: Sequence[Result], seeds: Sequence[int], rates: Mapping[Result, float]
) -> Scores:
    """Success by variant, (R, M), of the variants that have every task and seed."""
    tasks = list(dict.fromkeys(r.task for r in results))
    found = {(r.label, r.task, r.seed): rates[r] for r in results}
    scores: dict[str, NDArray[np.float64]] = {}
    for label in dict.fromkeys(r.label for r in results):
        keys = [[(label, task, seed) for task in tasks] for seed in seeds]
        if all(key in found for row in keys for key in row):
            scores[label] = np.array([[found[key] for key in row] for row in keys])
    return scores


def knobs_table(
    tasks: Sequence[StudyTask],
    results: Sequence[Result],
    configs: Mapping[tuple[str, str], Any],
    trials: Trials,
) -> str:
    """Each method's knobs in each task that are not its defaults, and what was tried for them."""
    rows = []
    for task in tasks:
        for label in dict.fromkeys(r.label for r in results if r.task == task.name):
            method = configs[task.name, label]
            default = type(method)()
            changed = {
                name: getattr(method, name)
                for name in vars(method)
                if getattr(method, name) != getattr(default, name)
            }
            shown = ", ".join(f"{name} {value}" for name, value in changed.items()) or "defaults"
            rows.append([task.name, label, shown, trials.text(task, label)])
    return table(["task", "method", "knobs", "tried"], rows)


def flags_table(tasks: Sequence[StudyTask], common: Mapping[str, Any]) -> str:
    """What all methods share in each task."""
    rows = []
    for task in tasks:
        flags = ", ".join(f"{k} {v}" for k, v in {**task.flags, **common}.items())
        rows.append([task.name, f"{task.recipe}, preset {task.preset}", flags or "the preset's"])
    return table(["task", "recipe", "settings"], rows)


def write_csv(results: Sequence[Result], path: Path) -> Path:
    """One row a run."""
    rows = [result.row() for result in results]
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_means_csv(results: Sequence[Result], path: Path) -> Path:
    """One row a task and variant: means over the seeds and standard deviations, as shares."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        names = ("base", "after_offline", "after_online")
        columns = [f"{name}_{what}" for name in names for what in ("mean", "sd")]
        writer = csv.DictWriter(file, fieldnames=["task", "method", "seeds", *columns])
        writer.writeheader()
        for task, label, group in grouped(results):
            rates = {name: [float(r.row()[name]) for r in group] for name in names}
            found: dict[str, object] = {"task": task, "method": label, "seeds": len(group)}
            for name, values in rates.items():
                found[f"{name}_mean"] = float(np.mean(values))
                found[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else ""
            writer.writerow(found)
    return path


def grouped(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
    """Task, label and the results of its seeds, in the order of the study."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.label), []).append(result)
    return [(task, label, group) for (task, label), group in groups.items()]


def mean_sd(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent; of one value the value alone."""
    if np.isnan(values).any():
        return "none"
    mean = percent(float(np.mean(values)))
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def estimate(found: Estimate) -> str:
    """A share and its interval, where there is one."""
    low, high = found.interval.low, found.interval.high
    if np.isnan(low):
        return percent(found.value)
    return f"{percent(found.value)} ({percent(low)} to {percent(high)})"

"""The page of a comparison of methods: `table.md`, `table.csv`, `summary.json` and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.methods.base import MethodConfig
from vla_trqam.report.page import write_json
from vla_trqam.report.provenance import command_line, git_commit, machine, package_versions
from vla_trqam.study.pictures import plot_aggregate, plot_curves
from vla_trqam.study.plan import StudyRun
from vla_trqam.study.results import Result
from vla_trqam.study.settings import CompareConfig
from vla_trqam.study.statistics import (
    compare_pairs,
    improvements,
    interquartile_means,
    performance_profiles,
)
from vla_trqam.study.tables import (
    aggregate_table,
    complete_scores,
    flags_table,
    knobs_table,
    missing_line,
    not_told_apart,
    pairs_table,
    success_table,
    write_csv,
    write_means_csv,
)
from vla_trqam.study.trials import Trials

PICTURES = "pictures"
OFFLINE, ONLINE = "after offline", "after online"
NOTES = (
    "Base, offline and online stand for the base policy, the policy after the offline updates, "
    "and that after the online ones: means over the seeds ± their standard deviation. Base and "
    "after online are of the final evaluation; after offline is of the evaluation during "
    "training, on other initial states, unless there are no online updates.",
    "All methods of a task and seed begin with one base and one replay, to the bit, and are "
    "evaluated on the same initial states.",
    "Bands of the curves: 95% intervals of the mean by a bootstrap of the seeds and of the "
    "episodes of each. Their last point is the final evaluation. Environment steps are those "
    "rolled out for training.",
    "Interquartile mean, probability of improvement (ties count half) and performance profiles "
    "are rliable's, with a bootstrap over the seeds of each task, which with three seeds of one "
    "task is the range of its runs and covers three times in four at most. Pairs: Student's "
    "interval of the seeds' scatter in each task, and a sign-flip test of the mean difference over "
    "tasks and seeds, corrected by Holm over all pairs.",
    "Rounds are the same number of episodes for every method, and a failure is longer than a "
    "success: who fails more rolls out more steps.",
    "Tried: each method's trials with their success, made before on other seeds; the best is what "
    "is compared.",
)


def write_comparison(
    settings: CompareConfig, runs: Sequence[StudyRun], results: Sequence[Result], trials: Trials
) -> str:
    """Writes everything into the study's folder; returns the page.

    Raises:
        UserError: no run is finished.
    """
    folder = settings.output_dir
    assert folder is not None
    if not results:
        raise UserError(f"no run of {folder} is finished: there is nothing to compare")
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    missing = missing_line(results, [(r.task, r.label, r.seed) for r in runs])
    figures = plot_curves(results, pictures)
    stages = [_aggregate(stage, settings, results, pictures) for stage in stages_of(results)]
    for stage in stages:
        figures |= stage.figures
    configs = {(run.task, run.label): run.config.method for run in runs}
    tasks = [settings.task(name) for name in settings.tasks]
    page = [
        f"# Comparison on {', '.join(settings.tasks)}",
        *(stage.headline for stage in stages),
        missing,
        "## Success",
        success_table(results),
        *(part for stage in stages for part in stage.tables),
        "\n".join(f"- {note}" for note in (*NOTES, clipping(configs)) if note),
        "## Settings",
        flags_table(tasks, settings.flags),
        knobs_table(tasks, results, configs, trials),
        _how_they_were_tried(settings, trials),
        "## Pictures",
        *(f"![{caption}]({PICTURES}/{path.name})" for path, caption in figures.items()),
        how_it_was_made(),
    ]
    text = "\n\n".join(part for part in page if part) + "\n"
    with written_whole(folder / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    write_csv(results, folder / "table.csv")
    write_means_csv(results, folder / "means.csv")
    summary = {stage.name: stage.summary for stage in stages}
    rows = [result.row() for result in results]
    write_json(folder / "summary.json", {**summary, "runs": rows, "trials": trials.records()})
    return text


def clipping(configs: Mapping[tuple[str, str], MethodConfig]) -> str:
    """Which methods clip large gradients: as their authors do, unless a knob says otherwise."""
    by_norm: dict[float | None, dict[str, None]] = {}
    for (_, label), config in configs.items():
        if hasattr(config, "max_grad_norm"):
            by_norm.setdefault(config.max_grad_norm, {})[label] = None
    told = [
        f"{', '.join(labels)}: {'not at all' if norm is None else f'to a norm of {norm:g}'}"
        for norm, labels in by_norm.items()
    ]
    return f"Gradients are clipped as each method's authors do. {'; '.join(told)}." if told else ""


def _how_they_were_tried(settings: CompareConfig, trials: Trials) -> str:
    if not trials.found:
        return ""
    flags = ", ".join(f"{k} {v}" for k, v in settings.trial_flags.items()) or "no others"
    return f"Trials: seeds {', '.join(map(str, settings.trial_seeds))}; settings beside: {flags}."


@dataclass(frozen=True)
class Stage:
    """What all tasks together say of one moment of the runs.

    Attributes:
        name: "after offline" or "after online".
        headline: which methods are not told apart.
        tables: with their headings.
        figures: with their captions.
        summary: the numbers.
    """

    name: str
    headline: str
    tables: Sequence[str] = ()
    figures: Mapping[Path, str] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def stages_of(results: Sequence[Result]) -> dict[str, dict[Result, float]]:
    """Success of every run at the moments that all of them have."""
    offline, final = ({r: r.offline for r in results}, {r: r.final for r in results})
    if not any("online" in result.metrics for result in results):
        return {OFFLINE: final}
    whole = not any(math.isnan(rate) for rate in offline.values())
    return {OFFLINE: offline, ONLINE: final} if whole else {ONLINE: final}


def _aggregate(
    name: str, settings: CompareConfig, results: Sequence[Result], pictures: Path
) -> Stage:
    """Nothing of a method without one of its runs: the rest is compared on other tasks."""
    scores = complete_scores(results, settings.seeds, stages_of(results)[name])
    title = f"{name[0].upper()}{name[1:]}"
    if not scores:
        return Stage(name, f"{title}: no method has all of its runs, and there is no aggregate.")
    first = next(iter(scores))
    means, pairs = interquartile_means(scores), compare_pairs(scores)
    beaten, profiles = improvements(scores, first), performance_profiles(scores)
    path = pictures / f"{name.replace(' ', '_')}.png"
    plot_aggregate(f"All tasks, {name}", means, beaten, profiles, path)
    return Stage(
        name=name,
        headline=f"{title}: {not_told_apart(pairs)}",
        tables=[
            f"## All tasks, {name}",
            aggregate_table(means, beaten),
            *([pairs_table(pairs)] if pairs else []),
        ],
        figures={path: f"All tasks, {name}: aggregate, improvement, performance profiles"},
        summary={
            "interquartile_mean": {label: asdict(found) for label, found in means.items()},
            "probability_of_improvement": {
                "of": first,
                "over": {label: asdict(found) for label, found in beaten.items()},
            },
            "pairs": [asdict(pair) | {"told_apart": pair.told_apart} for pair in pairs],
        },
    )


def how_it_was_made() -> str:
    """The command, the commit and the machine of a page."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [f"- commit: {git_commit() or 'not run from a git checkout'}"]
    lines += [f"- versions: {versions}", f"- machine: {facts}"]
    command, listing = command_line(), "\n".join(lines)
    return f"## How it was made\n\n```bash\n{command}\n```\n\n{listing}"

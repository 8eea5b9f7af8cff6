"""The page of a comparison of methods: `table.md`, `table.csv`, `summary.json` and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.report.page import write_json
from vla_trqam.report.provenance import command_line, git_commit, machine, package_versions
from vla_trqam.study.pictures import plot_aggregate, plot_curves
from vla_trqam.study.plan import StudyRun
from vla_trqam.study.results import Result
from vla_trqam.study.settings import StudySettings
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
)

PICTURES = "pictures"
NOTES = (
    "Base, offline and online stand for the base policy, the policy after the offline updates, "
    "and that after the online ones: means over the seeds ± their standard deviation. Base and "
    "after online are of the final evaluation; after offline is of the evaluation during "
    "training, on other initial states, unless there are no online updates.",
    "All methods of a task and seed begin with one base and one replay, to the bit, and are "
    "evaluated on the same initial states.",
    "Bands of the curves: 95% intervals of the mean by a bootstrap of the seeds and of the "
    "episodes of each. Environment steps are those rolled out for training.",
    "Interquartile mean, probability of improvement (ties count half) and performance profiles "
    "are rliable's, with a bootstrap over the seeds of each task. Pairs: sign-flip test of the "
    "mean difference over tasks and seeds, corrected by Holm over all pairs.",
)


def write_comparison(
    settings: StudySettings, runs: Sequence[StudyRun], results: Sequence[Result]
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
    summary, parts = _aggregate(settings, results, pictures, figures)
    configs = {(run.task, run.label): run.config.method for run in runs}
    tasks = [settings.task(name) for name in settings.tasks]
    page = [
        f"# Comparison on {', '.join(settings.tasks)}",
        *parts[:1],
        missing,
        "## Success",
        success_table(results),
        *parts[1:],
        "\n".join(f"- {note}" for note in NOTES),
        "## Settings",
        flags_table(tasks, settings.flags),
        knobs_table(tasks, results, configs),
        "## Pictures",
        *(f"![{caption}]({PICTURES}/{path.name})" for path, caption in figures.items()),
        how_it_was_made(),
    ]
    text = "\n\n".join(part for part in page if part) + "\n"
    with written_whole(folder / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    write_csv(results, folder / "table.csv")
    write_json(folder / "summary.json", summary | {"runs": [r.row() for r in results]})
    return text


def _aggregate(
    settings: StudySettings, results: Sequence[Result], pictures: Path, figures: dict[Path, str]
) -> tuple[dict[str, Any], list[str]]:
    """Numbers, and the headline before the tables over all tasks; nothing where runs are missing.

    A variant without one of its runs would be compared on other tasks than the rest.
    """
    scores = complete_scores(results, settings.seeds)
    if not scores:
        return {}, ["No method has all of its runs: there is no aggregate."]
    first = next(iter(scores))
    means, pairs = interquartile_means(scores), compare_pairs(scores)
    beaten, profiles = improvements(scores, first), performance_profiles(scores)
    path = plot_aggregate(means, beaten, profiles, pictures / "aggregate.png")
    figures[path] = "All tasks: aggregate, probability of improvement, performance profiles"
    summary: Mapping[str, Any] = {
        "interquartile_mean": {name: asdict(found) for name, found in means.items()},
        "probability_of_improvement": {
            "of": first,
            "over": {name: asdict(found) for name, found in beaten.items()},
        },
        "pairs": [asdict(pair) | {"told_apart": pair.told_apart} for pair in pairs],
    }
    tables = ["## Over all tasks", aggregate_table(means, beaten)]
    tables += ["## Pairs", pairs_table(pairs)] if pairs else []
    return dict(summary), [not_told_apart(pairs), *tables]


def how_it_was_made() -> str:
    """The command, the commit and the machine of a page."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [f"- commit: {git_commit() or 'not run from a git checkout'}"]
    lines += [f"- versions: {versions}", f"- machine: {facts}"]
    command, listing = command_line(), "\n".join(lines)
    return f"## How it was made\n\n```bash\n{command}\n```\n\n{listing}"

"""Turns finished runs of `recipes/finetune_robomimic.py` into recorded evidence.

    python benchmarks/collect_results.py seeds --runs outputs/s0 outputs/s1 outputs/s2 \
        --output docs/results/lift
    python benchmarks/collect_results.py methods --group "TRQAM=outputs/s0,outputs/s1" \
        --group "QAM beta=1=outputs/q0,outputs/q1" --output docs/results/methods
    python benchmarks/collect_results.py budgets --group 0.1=outputs/a --group 1=outputs/b \
        --output docs/results/budgets

Each writes `<output>.md`, and into `<output>/` raw numbers and figures, and prints the page. A
group's label ends at its last "=". Exits with 2 and one sentence when a run cannot be used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from run_results.combined_runs import (
    CombinedEvaluation,
    combine_seeds,
    comparison_table,
    plot_comparison,
)
from run_results.finished_run import FinishedRun, read_runs, shareable_command
from run_results.result_page import Page, duration, number, write_page
from run_results.result_rows import (
    BudgetRow,
    Groups,
    MethodRow,
    budget_row,
    check_initial_states,
    method_row,
    one_kl_unit,
    same_bases,
)
from run_results.step_columns import bases, note_on_steps, with_base_as_it_came

from vla_trqam.errors import UserError
from vla_trqam.report.comparison_plots import plot_budget_sweep
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.formats import percent, points, points_interval, table
from vla_trqam.report.metrics import summarise_trust_region
from vla_trqam.report.plots import plot_episodes, plot_success
from vla_trqam.report.provenance import command_line


def mean_gain(combined: CombinedEvaluation) -> str:
    """The mean over the seeds with both of its intervals; of one seed there is but one."""
    words = (
        f"Mean gain {points(combined.difference)} points (95% interval "
        f"{points_interval(combined.difference_interval)} of these seeds and states"
    )
    if len(combined.base_rates) > 1:
        words += f", {points_interval(combined.seeds_interval)} over the seeds by Student's t"
    return f"{words})"


def seeds_page(runs: Sequence[FinishedRun]) -> Page:
    """Several training seeds of one setting: does tuning help, and does it always?"""
    one_kl_unit(runs)
    combined = combine_seeds([run.evaluation for run in runs])
    worst = runs[combined.worst_run]
    below = [run.seed for run in runs if run.evaluation.difference < 0]
    headline = (
        f"**{runs[0].title}, {_count(runs)}, {len(runs[0].evaluation)} initial states: "
        f"{bases(runs)}; tuned median {percent(combined.median_tuned_rate)}.** "
        f"{mean_gain(combined)}; the least gain is seed "
        f"{worst.seed}'s, {points(combined.worst_difference)}; below their base: "
        f"{', '.join(f'seed {seed}' for seed in below) or 'none'}."
    )
    phases = list(dict.fromkeys(phase for run in runs for phase in run.wall_clock))
    clock = [
        [phase, *(duration(run.wall_clock.get(phase, 0.0)) for run in runs)] for phase in phases
    ]
    clock.append(["**total**", *(duration(sum(run.wall_clock.values())) for run in runs)])
    return Page(
        title=f"{runs[0].title}: {_count(runs)}",
        headline=headline,
        tables={
            "Success and KL by seed": _seeds_table(runs),
            **_by_task(runs),
            "Wall clock (minutes:seconds)": table(
                ["phase", *(f"seed {run.seed}" for run in runs)], clock
            ),
        },
        notes=[
            "Base and tuned policy meet the same initial states with the same noise. Intervals: "
            "paired difference by Newcombe's method 10; mean gain by a bootstrap over seeds and "
            "initial states, and over the seeds alone by Student's t.",
            f"Final KL ({runs[0].kl_unit}): mean estimate over the last tenth of the logged "
            "updates, without the clip that the moving average has.",
            *note_on_steps(runs),
        ],
        summary={
            "combined": combined.to_json(),
            "seeds": {
                run.name: {
                    "seed": run.seed,
                    "base_as_it_came": run.rate_as_it_came,
                    "flow_steps": None if run.flow_steps is None else asdict(run.flow_steps),
                    "kl_final": float(run.last("kl_estimate").mean()),
                    "lam_final": float(run.values("lam")[-1]),
                    "trust_region": _trust_region(run),
                }
                for run in runs
            },
        },
        draw=lambda folder: _draw_seeds(runs, folder),
        runs=runs,
    )


def methods_page(groups: Groups) -> Page:
    """Methods against each other, seed by seed."""
    runs = [run for group in groups.values() for run in group]
    one_kl_unit(runs)
    check_initial_states(runs)
    rows = {label: [method_row(run) for run in group] for label, group in groups.items()}
    medians = ", ".join(
        f"{label} {percent(float(np.median([row.tuned for row in group])))} "
        f"(below its base: {sum(row.tuned < row.base for row in group)} of {len(group)})"
        for label, group in rows.items()
    )
    worst = ", ".join(
        f"{label} {percent(float(np.median([row.worst_evaluation for row in group])))}"
        for label, group in rows.items()
    )
    unit = runs[0].kl_unit
    return Page(
        title=f"Methods compared: {', '.join(groups)}",
        headline=f"**Median success on {len(runs[0].evaluation)} initial states at the end: "
        f"{medians}.** Median of the worst evaluation during training: {worst}.",
        tables={
            "Success": comparison_table(
                {label: [run.evaluation for run in group] for label, group in groups.items()}
            ),
            f"Every run (KL in {unit})": _methods_table(rows),
        },
        notes=[
            "Worst evaluation: the least success of the evaluations during training, on initial "
            "states of their own; beside it the base's on the same.",
            "KL: path-space estimates of logged batches, not clipped; final: mean over the last "
            "tenth of them. Adjoint loss: medians over the first and the last tenth (single "
            "batches can be ten times as large); its scale goes with 1/λ and with β², so compare "
            "its course, not its size, over methods.",
            same_bases(groups),
            *note_on_steps(runs),
        ],
        summary={label: [asdict(row) for row in group] for label, group in rows.items()},
        draw=lambda folder: _draw_methods(groups, folder, unit),
        runs=runs,
    )


def budgets_page(groups: Groups) -> Page:
    """KL budgets against each other: does the KL follow its budget, and what does it buy?

    Raises:
        UserError: a label is no number, or not the budget that its runs logged.
    """
    runs = [run for group in groups.values() for run in group]
    one_kl_unit(runs)
    check_initial_states(runs)
    budgets = {_budget(label): group for label, group in groups.items()}
    if len(budgets) < len(groups):
        raise UserError("a budget has two groups; give all its runs in one --group")
    rows = [budget_row(run, budget) for budget in sorted(budgets) for run in budgets[budget]]
    held = sum(row.held for row in rows)
    return Page(
        title=f"KL budgets {', '.join(f'{budget:g}' for budget in sorted(budgets))}",
        headline=(
            f"**Over the last half of training the KL's moving average stays within 20% of its "
            f"budget, or λ sits on a bound, in {held} of {len(rows)} runs.**"
        ),
        tables={"": _budgets_table(rows)},
        notes=[
            f"Budgets in {runs[0].kl_unit}; all columns over the last half of the off-policy "
            "updates, at the logged lines; success on the final initial states.",
            "`kl_ema` averages estimates clipped at a multiple of the budget (`method.kl_clip`); "
            '"unclipped" is the mean of the estimates themselves over the budget.',
            *note_on_steps(runs),
        ],
        summary={"runs": [asdict(row) for row in rows]},
        draw=lambda folder: _draw_budgets(budgets, folder, runs[0].kl_unit),
        runs=runs,
    )


def _seeds_table(runs: Sequence[FinishedRun]) -> str:
    header = ["seed", "base", "tuned", "difference (points)", "95% interval", "gained", "lost"]
    header += ["final KL", "KL budget", "EMA within 20%, last half", "final λ", "wall clock"]
    rows = []
    for run in runs:
        evaluation, region = run.evaluation, summarise_trust_region(run.metrics)
        rows.append(
            [
                str(run.seed),
                percent(evaluation.base_rate),
                percent(evaluation.tuned_rate),
                points(evaluation.difference),
                points_interval(evaluation.difference_interval()),
                str(len(evaluation.gained)),
                str(len(evaluation.lost)),
                number(float(run.last("kl_estimate").mean())),
                "none" if region is None else number(region.kl_budget),
                "" if region is None else f"{region.share_within:.0%} of the time",
                number(float(run.values("lam")[-1])),
                duration(sum(run.wall_clock.values())),
            ]
        )
    return table(*with_base_as_it_came(header, rows, [run.rate_as_it_came for run in runs]))


def _by_task(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Of a suite: each task's success before and after, a column a seed; else nothing."""
    tasks = [(run.seed, run.evaluation.by_task()) for run in runs]
    names = list(tasks[0][1])
    if any(list(found) != names for _, found in tasks):
        raise UserError("the runs are not of the same tasks: collect those of each suite by itself")
    if not names:
        return {}
    worse = [
        f"{name} (seed {seed})"
        for name in names
        for seed, found in tasks
        if found[name].difference_interval().high < 0.0
    ]
    rows = [[name, *(_change(found[name]) for _, found in tasks)] for name in names]
    header = ["task", *(f"seed {seed}" for seed, _ in tasks)]
    return {
        "Success by task: base → tuned, difference in points (95% interval)": table(header, rows)
        + f"\n\nWorse, with an interval below zero: {', '.join(worse) or 'none'}."
    }


def _change(evaluation: PairedEvaluation) -> str:
    interval = points_interval(evaluation.difference_interval())
    rates = f"{percent(evaluation.base_rate)} → {percent(evaluation.tuned_rate)}"
    return f"{rates}, {points(evaluation.difference)} ({interval})"


def _methods_table(rows: Mapping[str, Sequence[MethodRow]]) -> str:
    header = ["", "seed", "base", "tuned", "below its base", "worst evaluation (base's)"]
    header += ["max KL", "final KL", "adjoint loss, first → last", "ratio", "final λ"]
    flat = [(label, row) for label, group in rows.items() for row in group]
    cells = [
        [
            label,
            str(row.seed),
            percent(row.base),
            percent(row.tuned),
            "**yes**" if row.tuned < row.base else "no",
            f"{percent(row.worst_evaluation)} ({percent(row.first_evaluation)})",
            number(row.kl_max),
            number(row.kl_final),
            f"{number(row.adjoint_loss_first)} → {number(row.adjoint_loss_last)}",
            number(row.adjoint_loss_last / row.adjoint_loss_first),
            number(row.lam_final),
        ]
        for label, row in flat
    ]
    return table(*with_base_as_it_came(header, cells, [row.as_it_came for _, row in flat]))


def _budgets_table(rows: Sequence[BudgetRow]) -> str:
    header = ["budget", "seed", "mean EMA / budget", "least", "largest", "unclipped"]
    header += ["within 20%", "λ on a bound", "holds", "final λ", "base", "tuned"]
    cells = [
        [
            f"{row.budget:g}",
            str(row.seed),
            f"{row.ratio_mean:.3f}",
            f"{row.ratio_min:.3f}",
            f"{row.ratio_max:.3f}",
            f"{row.unclipped_ratio:.3f}",
            f"{row.share_within:.0%}",
            f"{row.share_on_bound:.0%}",
            "yes" if row.held else "**no**",
            number(row.lam_final),
            percent(row.base),
            percent(row.tuned),
        ]
        for row in rows
    ]
    return table(*with_base_as_it_came(header, cells, [row.as_it_came for row in rows]))


def _draw_seeds(runs: Sequence[FinishedRun], folder: Path) -> dict[Path, str]:
    by_seed = {f"seed {run.seed}": [run.metrics_path] for run in runs}
    figures = {plot_comparison(by_seed, folder / "seeds.png", kl_unit=runs[0].kl_unit): "All seeds"}
    for run in runs:
        path = folder / f"{run.name}_success.png"
        plot_success(run.metrics, path, evaluation=run.evaluation)
        figures[path] = f"Seed {run.seed}: success with 95% intervals"
        path = folder / f"{run.name}_episodes.png"
        figures[plot_episodes(run.evaluation, path)] = f"Seed {run.seed}: every initial state"
        # Only the run itself had critic and replay at hand; it draws none without known returns.
        drawn = run.folder / "plots" / "q_against_returns.png"
        if drawn.is_file():
            path = folder / f"{run.name}_q_against_returns.png"
            shutil.copyfile(drawn, path)
            figures[path] = f"Seed {run.seed}: Q against Monte-Carlo returns"
    return figures


def _draw_methods(groups: Groups, folder: Path, unit: str) -> dict[Path, str]:
    paths = {label: [run.metrics_path for run in group] for label, group in groups.items()}
    return {plot_comparison(paths, folder / "methods.png", kl_unit=unit): "Methods"}


def _draw_budgets(
    budgets: Mapping[float, Sequence[FinishedRun]], folder: Path, unit: str
) -> dict[Path, str]:
    paths = {budget: [run.metrics_path for run in group] for budget, group in budgets.items()}
    return {plot_budget_sweep(paths, folder / "budgets.png", kl_unit=unit): "KL budgets"}


def _budget(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        raise UserError(f"--group {label}=...: a budget is a number of nats") from None


def _trust_region(run: FinishedRun) -> dict[str, object] | None:
    region = summarise_trust_region(run.metrics)
    return None if region is None else asdict(region)


def _count(runs: Sequence[FinishedRun]) -> str:
    return f"{len(runs)} training seed{'s' if len(runs) > 1 else ''}"


def read_groups(arguments: Sequence[str]) -> dict[str, list[FinishedRun]]:
    """Reads `LABEL=FOLDER,FOLDER,...` of every group.

    Raises:
        UserError: an argument is not of this form, or a label or a run is given twice.
    """
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        label, _, listed = argument.rpartition("=")
        if not label or not listed.strip(","):
            raise UserError(f"--group {argument}: write it as LABEL=FOLDER,FOLDER,...")
        if label in folders:
            raise UserError(f"--group {label} is given twice; give all its runs in one --group")
        folders[label] = [Path(folder) for folder in listed.split(",") if folder]
    runs = iter(read_runs([folder for group in folders.values() for folder in group]))
    return {label: [next(runs) for _ in group] for label, group in folders.items()}


def own_command() -> str:
    """This command line without machine paths; folders of runs by their names alone."""
    return shareable_command(command_line())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    seeds = kinds.add_parser("seeds", help="several training seeds of one setting")
    seeds.add_argument("--runs", nargs="+", type=Path, required=True, metavar="FOLDER")
    for name, text in (("methods", "method against method"), ("budgets", "a sweep of the budget")):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument(
            "--group", action="append", required=True, metavar="LABEL=FOLDER,FOLDER,..."
        )
    for kind in kinds.choices.values():
        kind.add_argument("--output", type=Path, required=True, help="the page without .md")
    return parser


def make_page(options: argparse.Namespace) -> Page:
    """The page that the command line asks for."""
    if options.kind == "seeds":
        return seeds_page(read_runs(options.runs))
    pages = {"methods": methods_page, "budgets": budgets_page}
    return pages[options.kind](read_groups(options.group))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        path = write_page(make_page(options), options.output, own_command())
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report of a run: `report.md` to read, `report.json` with the raw numbers behind it."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vla_trqam.files import written_whole
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.formats import jsonable, percent, table
from vla_trqam.report.metrics import (
    Metrics,
    TrustRegionSummary,
    read_metrics,
    summarise_trust_region,
)
from vla_trqam.report.provenance import command_line, git_commit, machine, package_versions
from vla_trqam.report.success import differences, effect_of_steps, success_table

CAPTIONS = {
    "pretraining": "Behaviour-cloning loss of the pretraining",
    "success": "Success rate with 95% intervals",
    "episodes": "Base and tuned policy on each initial state",
    "success_by_task": "Success in each task with 95% intervals",
    "kl": "KL from the base policy, and its budget",
    "lambda": "Multiplier of the trust region",
    "adjoint": "Norm of the adjoint and adjoint-matching loss",
    "critic": "TD loss and Q",
    "q_against_returns": "Q against Monte-Carlo returns",
}


NOT_EVALUATED = "**Not evaluated**: the run had no simulator. Nothing is known of its success yet."


def write_report(
    output_dir: Path,
    *,
    config: Mapping[str, Any],
    evaluation: PairedEvaluation | None,
    metrics_path: Path,
    step: int,
    wall_clock: Mapping[str, float],
    plots: Sequence[Path] = (),
    videos: Sequence[Path] = (),
    title: str = "Run",
    simulator: Mapping[str, str] | None = None,
    seeds: Mapping[str, int] | None = None,
    command: str | None = None,
    kl_unit: str = "nats",
    flow_steps: FlowSteps | None = None,
) -> Path:
    """Write `report.md` and `report.json`; returns the path of the former.

    Args:
        output_dir: The run's folder; links in the report are relative to it.
        config: Every setting of the run.
        evaluation: Base and tuned policy on the same initial states; None for a run without a
            simulator, of which the report says so.
        metrics_path: The run's `metrics.jsonl`.
        step: Updates of the policy that is reported on.
        wall_clock: Seconds by phase.
        plots: Figures to show; a missing file is a ValueError.
        videos: Videos to link; likewise.
        title: What was run, for instance "TRQAM on Lift".
        simulator: ``name`` and ``task`` of what was played; None for a run without.
        seeds: The run's random seeds by purpose; those of the initial states are in `evaluation`.
        command: Command line to record; this process's own unless given.
        kl_unit: Unit of the KL and its budget.
        flow_steps: Of the base as it came, and of the tuned policy.
    """
    _check_exist([*plots, *videos])
    metrics = read_metrics(metrics_path)
    trust_region = summarise_trust_region(metrics)
    provenance = _provenance(command, seeds)
    raw = {
        "title": title,
        "simulator": None if simulator is None else dict(simulator),
        "step": step,
        "evaluation": None if evaluation is None else evaluation.to_json(),
        "flow_steps": None if flow_steps is None else asdict(flow_steps),
        "trust_region": None if trust_region is None else asdict(trust_region),
        "final_metrics": _last_values(metrics),
        "wall_clock_seconds": dict(wall_clock),
        "provenance": provenance,
        "config": dict(config),
    }
    sections = [
        f"# {title}",
        NOT_EVALUATED if evaluation is None else _verdict(evaluation),
        "" if evaluation is None else _success_section(evaluation),
        _trust_region_section(trust_region, kl_unit),
        _time_section(wall_clock),
        _media_section(output_dir, plots, videos),
        _provenance_section(provenance, evaluation, flow_steps),
        _config_section(config),
    ]
    write_json(output_dir / "report.json", raw)
    text = "\n\n".join(section for section in sections if section) + "\n"
    return _write(output_dir / "report.md", text)


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write valid JSON at once or not at all; NaN and infinities become strings."""
    return _write(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def _verdict(evaluation: PairedEvaluation) -> str:
    interval = evaluation.difference_interval()
    named = f"The interval of the {differences(evaluation)[0][0]}"
    if not interval.excludes_zero():
        claim = f"{named} includes zero: no difference is shown."
    elif evaluation.difference > 0:
        claim = f"{named} excludes zero: the tuned policy is better."
    else:
        claim = f"{named} excludes zero: the tuned policy is **worse**."
    came = evaluation.as_it_came
    base = percent(evaluation.base_rate)
    if came is not None:
        base = f"as it came {percent(float(came.success.mean()))}, with the tuned flow steps {base}"
    parts = [
        f"**Success: base {base} → tuned {percent(evaluation.tuned_rate)}** on {len(evaluation)}"
        f" fixed initial states. {claim}",
        effect_of_steps(evaluation),
    ]
    return " ".join(part for part in parts if part)


def _success_section(evaluation: PairedEvaluation) -> str:
    same = "" if evaluation.as_it_came is None else " Gained, lost and the test are tuning's."
    return "\n".join(
        [
            "## Success",
            "",
            success_table(evaluation),
            "",
            "Intervals: Wilson for the rates; Newcombe's method 10 for the paired differences."
            f" McNemar's exact test: p = {evaluation.mcnemar_p():.2g}.{same}",
            "",
            f"- gained: {len(evaluation.gained)}{_seed_list(evaluation.gained)}",
            f"- lost: {len(evaluation.lost)}{_seed_list(evaluation.lost)}",
            f"- kept: {len(evaluation.kept)}; failed by both: {len(evaluation.failed_both)}",
        ]
    )


def _trust_region_section(summary: TrustRegionSummary | None, kl_unit: str) -> str:
    if summary is None:
        return "## Trust region\n\nThe run logged no KL budget: it had no trust region."
    free = summary.worst_relative_error
    rows = [
        [f"KL budget ({kl_unit})", f"{summary.kl_budget:.4g}"],
        [f"KL, moving average, mean ({kl_unit})", f"{summary.kl_ema_mean:.4g}"],
        [f"time within {summary.tolerance:.0%} of the budget", f"{summary.share_within:.0%}"],
        ["worst error while λ was free", "never free" if math.isnan(free) else f"{free:.0%}"],
        ["final λ", f"{summary.lam_final:.4g}"],
        ["time with λ on its lower bound", f"{summary.share_on_lower_bound:.0%}"],
        ["time with λ on its upper bound", f"{summary.share_on_upper_bound:.0%}"],
    ]
    followed = "followed" if summary.held else "did **not** always follow"
    verdict = f"The KL {followed} its budget (within {summary.tolerance:.0%}, or λ on a bound)."
    figures = table(["over the last half of training", ""], rows)
    return f"## Trust region\n\n{verdict}\n\n{figures}"


def _time_section(wall_clock: Mapping[str, float]) -> str:
    rows = [[phase, _duration(seconds)] for phase, seconds in wall_clock.items()]
    rows.append(["**total**", _duration(sum(wall_clock.values()))])
    return "## Time\n\n" + table(["phase", "wall clock"], rows)


def _media_section(output_dir: Path, plots: Sequence[Path], videos: Sequence[Path]) -> str:
    parts = []
    if plots:
        images = [f"![{caption(plot)}]({_link(plot, output_dir)})" for plot in plots]
        parts += ["## Figures", *images]
    if videos:
        links = [f"- [{video.name}]({_link(video, output_dir)})" for video in videos]
        parts += ["## Videos", "\n".join(links)]
    return "\n\n".join(parts)


def _provenance(command: str | None, seeds: Mapping[str, int] | None) -> dict[str, Any]:
    return {
        "command": command_line() if command is None else command,
        "seeds": dict(seeds or {}),
        "commit": git_commit(),
        "versions": package_versions(),
        "machine": machine(),
    }


def _provenance_section(
    provenance: Mapping[str, Any],
    evaluation: PairedEvaluation | None,
    steps: FlowSteps | None,
) -> str:
    lines = [f"- {purpose} seed: {seed}" for purpose, seed in provenance["seeds"].items()]
    if evaluation is not None:
        first, last = int(evaluation.seeds.min()), int(evaluation.seeds.max())
        lines.append(f"- initial states: {len(evaluation)} seeds, {first} to {last}")
    if steps is not None:
        lines.append(f"- flow steps: {steps.tuned}; the base came with {steps.own}")
    lines.append(f"- commit: {provenance['commit'] or 'not run from a git checkout'}")
    versions = provenance["versions"].items()
    lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions))
    lines.append("- machine: " + ", ".join(f"{k} {v}" for k, v in provenance["machine"].items()))
    listing = "\n".join(lines)
    return f"## How it was made\n\n```bash\n{provenance['command']}\n```\n\n{listing}"


def _config_section(config: Mapping[str, Any]) -> str:
    text = json.dumps(jsonable(config), indent=2, allow_nan=False)
    summary = "<summary>Every setting</summary>"
    return f"<details>{summary}\n\n```json\n{text}\n```\n\n</details>"


def _last_values(metrics: Metrics) -> dict[str, dict[str, float]]:
    return {
        phase: {name: float(series.value[-1]) for name, series in by_name.items()}
        for phase, by_name in metrics.items()
    }


def _check_exist(files: Iterable[Path]) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"the report would link to files that do not exist: {missing}")


def _write(path: Path, text: str) -> Path:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def caption(plot: Path) -> str:
    """Of a figure, by its name."""
    return CAPTIONS.get(plot.stem, plot.stem.replace("_", " "))


def _link(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file, folder)).as_posix())


def _seed_list(seeds: Iterable[int]) -> str:
    listed = ", ".join(map(str, seeds))
    return f" (seeds {listed})" if listed else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

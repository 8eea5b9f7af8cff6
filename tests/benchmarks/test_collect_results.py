"""Pages of results say what the runs' files say, and nothing about the machine."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from collect_results import main, read_groups
from matplotlib.figure import Figure
from run_results.finished_run import read_run, shareable_command

from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import BaseAsItCame, PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.page import write_json, write_report

MACHINE = "/home/somebody/machine"
STATES = 20


def outcomes(base: int, tuned: int, first_seed: int = 10_000) -> PairedEvaluation:
    """The base solves the first states, the tuned policy the last ones."""
    number = np.arange(STATES)
    return PairedEvaluation(
        first_seed + number,
        number < base,
        number >= STATES - tuned,
        np.full(STATES, 90),
        np.full(STATES, 60),
    )


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    evaluation: PairedEvaluation | None = None,
    kl: Sequence[float] = (0.5,) * 40,
    lam: float = 0.4,
    budget: float | None = 0.5,
    adjoint_loss: Sequence[float] = (100.0,) * 40,
    evaluations: Sequence[float] = (0.5, 0.7),
    base_weights: bytes = b"weights",
    method: str = "trqam",
) -> Path:
    evaluation = evaluation or outcomes(10, 16)
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "output_dir": f"{MACHINE}/{folder.name}",
        "dataset": {"path": f"{MACHINE}/data/lift.hdf5"},
        "method": {"name": method},
        "trqam": {"kl_per_action": True, "kl_budget": budget},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for number, rate in enumerate(evaluations):
            log.log(20 * number, "eval", {"success_rate": rate, "episodes": 10})
        limits = {"kl_budget": budget, "lam_min": 0.03, "lam_max": 300.0} if budget else {}
        for step, (value, loss) in enumerate(zip(kl, adjoint_loss, strict=True)):
            values = {"kl_estimate": value, "kl_ema": value, "lam": lam, "adjoint_loss": loss}
            log.log(step, "offline" if step < 20 else "online", values | limits)
    write_json(folder / "evaluation.json", evaluation.to_json())
    command = (
        f"accelerate launch {MACHINE}/recipes/finetune_robomimic.py "
        f"--output_dir={MACHINE}/{folder.name} --dataset.path {MACHINE}/data/lift.hdf5"
    )
    report = {
        "title": "TRQAM on Lift",
        "wall_clock_seconds": {"offline": 90.0, "online": 31.0},
        "provenance": {
            "command": command,
            "seeds": {"training": seed},
            "commit": None,
            "versions": {"torch": "2.11.0"},
            "machine": {"cpu_cores": 2},
        },
    }
    write_json(folder / "report.json", report)
    (folder / "base_policy").mkdir()
    (folder / "base_policy" / "model.safetensors").write_bytes(base_weights)
    return folder


def collect(*arguments: Any, output: Path) -> tuple[str, dict[str, Any]]:
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    text = output.with_name(f"{output.name}.md").read_text(encoding="utf-8")
    return text, json.loads((output / "summary.json").read_text())


@pytest.fixture
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not rendered, which takes most of a page's time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b"png"))


def row(text: str, *start: str) -> list[str]:
    """The cells of the only table row that starts so."""
    head = "| " + " | ".join(start) + " |"
    (line,) = [line for line in text.splitlines() if line.startswith(head)]
    return line.strip("| ").split(" | ")


@pytest.mark.usefixtures("no_rendering")
def test_a_suite_has_each_task_by_seed_and_says_which_are_worse(tmp_path: Path) -> None:
    """The base solves states 0 to 9, the tuned policy 8 to 19: all of the second task's."""
    tasks = ("close",) * 10 + ("open",) * 10
    runs = [
        make_run(
            tmp_path / f"s{seed}", seed=seed, evaluation=replace(outcomes(10, 12), tasks=tasks)
        )
        for seed in (0, 1)
    ]
    text, _ = collect("seeds", "--runs", *runs, output=tmp_path / "page")
    cells = row(text, "close")[1:]
    assert len(cells) == 2
    assert cells[0] == cells[1]
    assert cells[0].startswith("100.0% → 20.0%, -80.0 (-")
    assert row(text, "open")[1].startswith("0.0% → 100.0%, +100.0 (")
    assert "Worse, with an interval below zero: close (seed 0), close (seed 1)." in text
    alone, _ = collect(
        "seeds", "--runs", make_run(tmp_path / "one", seed=3), output=tmp_path / "other"
    )
    assert "by task" not in alone


@pytest.mark.usefixtures("no_rendering")
def test_the_page_of_seeds_has_median_and_least_gain_of_hand_counted_outcomes(
    tmp_path: Path,
) -> None:
    runs = [
        make_run(tmp_path / f"s{seed}", seed=seed, evaluation=outcomes(10, tuned))
        for seed, tuned in enumerate((18, 20, 9))
    ]
    text, summary = collect("seeds", "--runs", *runs, output=tmp_path / "lift")
    assert "base 50.0%, 50.0%, 50.0%; tuned median 90.0%" in text
    assert "the least gain is seed 2's, -5.0; below their base: seed 2." in text
    # Base solves states 0-9, tuned 11-19: nine gained, ten lost.
    assert row(text, "2")[1:4] == ["50.0%", "45.0%", "-5.0"]
    assert row(text, "2")[5:7] == ["9", "10"]
    assert row(text, "2")[-1] == "2:01"
    assert row(text, "offline")[1:] == ["1:30"] * 3
    assert summary["combined"]["median_tuned_rate"] == 0.9


def with_other_steps(base: int, tuned: int, came: int) -> PairedEvaluation:
    """The same, with a base that came with 10 flow steps where the others take 4."""
    first = BaseAsItCame(np.arange(STATES) < came, np.full(STATES, 90), FlowSteps(10, 4))
    return replace(outcomes(base, tuned), as_it_came=first)


@pytest.mark.usefixtures("no_rendering")
def test_the_page_of_seeds_tells_bases_as_they_came_from_those_that_tuning_began_with(
    tmp_path: Path,
) -> None:
    runs = [
        make_run(tmp_path / f"s{seed}", seed=seed, evaluation=with_other_steps(10, 18, came))
        for seed, came in enumerate((8, 12))
    ]
    text, summary = collect("seeds", "--runs", *runs, output=tmp_path / "lift")
    assert (
        "base as it came (10 flow steps) 40.0%, 60.0%; base with 4 flow steps 50.0%, 50.0%; tuned "
        "median 90.0%.** Mean gain +40.0 points"
    ) in text
    assert row(text, "seed")[1:5] == ["base as it came", "base", "tuned", "difference (points)"]
    assert row(text, "1")[1:5] == ["60.0%", "50.0%", "90.0%", "+40.0"]
    assert "a gain is tuning's" in text
    assert summary["seeds"]["s1"]["base_as_it_came"] == 0.6
    assert summary["seeds"]["s1"]["flow_steps"] == {"own": 10, "tuned": 4}
    raw = json.loads((tmp_path / "lift" / "s1.json").read_text())["evaluation"]
    assert raw["base_as_it_came"]["rate"] == 0.6


@pytest.mark.usefixtures("no_rendering")
def test_pages_that_compare_have_a_column_for_bases_as_they_came(tmp_path: Path) -> None:
    four = make_run(tmp_path / "four", evaluation=with_other_steps(10, 18, 8))
    own = make_run(tmp_path / "own")
    text, _ = collect("methods", f"--group=A={four}", f"--group=B={own}", output=tmp_path / "m")
    assert row(text, "A", "0")[2:5] == ["40.0%", "50.0%", "90.0%"]
    assert row(text, "B", "0")[2:5] == ["", "50.0%", "80.0%"]
    text, _ = collect("budgets", f"--group=0.5={four},{own}", output=tmp_path / "b")
    assert row(text, "budget")[-3:] == ["base as it came", "base", "tuned"]
    assert "| 40.0% | 50.0% | 90.0% |" in text


@pytest.mark.usefixtures("no_rendering")
def test_nothing_written_names_the_machine(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("s0", "s1")]
    groups = [f"--group=0.5={runs[0]},{runs[1]}"]
    page, _ = collect("budgets", *groups, output=tmp_path / "out" / "budgets")
    written = [f for f in (tmp_path / "out").rglob("*") if f.suffix in (".md", ".json")]
    assert len(written) == 4
    for file in written:
        text = file.read_text(encoding="utf-8")
        assert MACHINE not in text
        assert str(tmp_path) not in text
    assert (
        "accelerate launch recipes/finetune_robomimic.py --output_dir=s1 --dataset.path lift.hdf5"
        in page
    )


def test_paths_in_group_flags_lose_their_folders_too() -> None:
    command = shareable_command("python x.py --group 'QAM b=1=/tmp/q0,/tmp/q1' --n=/tmp/a b/c")
    assert command == "python x.py --group 'QAM b=1=q0,q1' --n=a b/c"


@pytest.mark.usefixtures("no_rendering")
def test_raw_numbers_rebuild_the_evaluation_and_keep_what_is_not_finite(tmp_path: Path) -> None:
    evaluation = outcomes(8, 15)
    losses = [math.nan if step == 39 else 2.0 for step in range(40)]
    run = make_run(tmp_path / "s0", evaluation=evaluation, adjoint_loss=losses)
    collect("budgets", f"--group=0.5={run}", output=tmp_path / "lift")
    raw = json.loads((tmp_path / "lift" / "s0.json").read_text())
    rebuilt = PairedEvaluation.from_json(raw["evaluation"])
    np.testing.assert_array_equal(rebuilt.tuned_success, evaluation.tuned_success)
    assert raw["metrics"]["online"]["adjoint_loss"]["value"][-1] == "NaN"
    assert raw["metrics"]["eval"]["success_rate"] == {"step": [0, 20], "value": [0.5, 0.7]}


@pytest.mark.usefixtures("no_rendering")
def test_metrics_of_a_long_run_are_thinned_to_a_small_file(tmp_path: Path) -> None:
    steps = 5000
    run = make_run(tmp_path / "s0", kl=np.linspace(0.1, 0.9, steps), adjoint_loss=[1.0] * steps)
    collect("budgets", f"--group=0.5={run}", output=tmp_path / "lift")
    assert (tmp_path / "lift" / "s0.json").stat().st_size < 50_000
    series = json.loads((tmp_path / "lift" / "s0.json").read_text())["metrics"]["online"]
    assert series["kl_ema"]["step"][0] == 20
    assert series["kl_ema"]["step"][-1] == steps - 1
    assert series["kl_ema"]["value"][-1] == 0.9


def test_the_page_of_methods_shows_the_collapse_that_the_metrics_hold(tmp_path: Path) -> None:
    steady = make_run(tmp_path / "t0")
    drifting = make_run(
        tmp_path / "q0",
        method="qam",
        budget=None,
        lam=1.0,
        evaluation=outcomes(10, 4),
        kl=[*np.linspace(0, 9, 36), 6.0, 8.0, 6.0, 8.0],
        adjoint_loss=[*[50.0] * 4, *[1e3] * 32, 4e3, 6e3, 4e3, 9e6],
        evaluations=(0.5, 0.1, 0.3),
    )
    groups = [f"--group=TRQAM={steady}", f"--group=QAM beta=1={drifting}"]
    text, summary = collect("methods", *groups, output=tmp_path / "methods")
    (qam,) = summary["QAM beta=1"]
    assert qam["kl_max"] == 9.0
    assert qam["kl_final"] == 7.0
    assert (qam["adjoint_loss_first"], qam["adjoint_loss_last"]) == (50.0, 5000.0)
    assert (qam["first_evaluation"], qam["worst_evaluation"]) == (0.5, 0.1)
    assert row(text, "QAM beta=1", "0")[2:5] == ["50.0%", "20.0%", "**yes**"]
    assert row(text, "TRQAM", "0")[4] == "no"
    assert "Seeds whose runs all start from one base policy, to the bit: 0." in text
    assert '`method.type` "trqam", "qam"' in text


@pytest.mark.usefixtures("no_rendering")
def test_runs_from_different_bases_are_told(tmp_path: Path) -> None:
    first = make_run(tmp_path / "t0")
    other = make_run(tmp_path / "q0", base_weights=b"other")
    groups = [f"--group=TRQAM={first}", f"--group=QAM={other}"]
    text, _ = collect("methods", *groups, output=tmp_path / "methods")
    assert "**Seeds whose bases differ between runs: 0.**" in text


def test_the_sweep_judges_the_last_half_alone(tmp_path: Path) -> None:
    # Half of the steps is 19.5: twenty lines count, two of them off by more than 20%.
    kl = [5.0] * 20 + [0.27, 0.3, 0.33, 0.39, 0.18] + [0.3] * 15
    run = make_run(tmp_path / "b", kl=kl, budget=0.3)
    text, summary = collect("budgets", f"--group=0.3={run}", output=tmp_path / "budgets")
    (row_,) = summary["runs"]
    assert (row_["ratio_min"], row_["ratio_max"]) == pytest.approx((0.6, 1.3))
    assert row_["ratio_mean"] == pytest.approx(np.mean(kl[20:]) / 0.3)
    assert row_["share_within"] == pytest.approx(0.9)
    assert row_["share_on_bound"] == 0.0
    assert row_["held"] is False
    assert "in 0 of 1 runs" in text


@pytest.mark.usefixtures("no_rendering")
def test_a_multiplier_on_its_bound_excuses_the_kl(tmp_path: Path) -> None:
    run = make_run(tmp_path / "b", kl=[0.1] * 40, budget=1.0, lam=0.03)
    text, summary = collect("budgets", f"--group=1={run}", output=tmp_path / "budgets")
    assert summary["runs"][0]["share_on_bound"] == 1.0
    assert summary["runs"][0]["share_within"] == 0.0
    assert "in 1 of 1 runs" in text


@pytest.mark.usefixtures("no_rendering")
def test_a_second_collection_replaces_the_first_and_its_index_entry_only(tmp_path: Path) -> None:
    index = tmp_path / "README.md"
    index.write_text("<!-- begin kl -->\nold\n<!-- end kl -->\n<!-- begin can -->\nkept\n")
    for name in ("first", "second"):
        run = make_run(tmp_path / name)
        collect("budgets", f"--group=0.5={run}", output=tmp_path / "kl")
    assert [f.name for f in sorted((tmp_path / "kl").glob("*.json"))] == [
        "second.json",
        "summary.json",
    ]
    text = index.read_text()
    assert "in 1 of 1 runs" in text
    assert "[Page](kl.md)" in text
    assert "old" not in text
    assert "kept" in text


def refusal(capsys: pytest.CaptureFixture[str], output: Path, *arguments: Any, wants: str) -> None:
    before = sorted(output.parent.rglob("*"))
    assert main([*map(str, arguments), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert wants in message
    assert message.count("\n") == 1
    assert sorted(output.parent.rglob("*")) == before


def test_runs_that_cannot_be_used_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run(tmp_path / "good")
    elsewhere = make_run(tmp_path / "elsewhere", evaluation=outcomes(10, 12, first_seed=77))
    unfinished = make_run(tmp_path / "unfinished")
    (unfinished / "report.json").unlink()
    damaged = make_run(tmp_path / "damaged")
    (damaged / "evaluation.json").write_text("{")
    fewer = make_run(tmp_path / "fewer", evaluation=with_other_steps(10, 12, 9))
    cases: list[tuple[list[Any], str]] = [
        (["seeds", "--runs", tmp_path / "nowhere"], "nowhere is not a folder"),
        (["seeds", "--runs", unfinished], "report.json does not exist"),
        (["seeds", "--runs", damaged], "evaluation.json is not JSON"),
        (["seeds", "--runs", good, good], "the run good is given twice"),
        (["seeds", "--runs", good, elsewhere], "other initial states"),
        (["seeds", "--runs", good, fewer], "with 4 flow steps where its base came with 10"),
        (["methods", f"--group=A={good}", f"--group=B={elsewhere}"], "other initial states"),
        (["methods", "--group=A"], "LABEL=FOLDER"),
        (["budgets", f"--group=1={good}"], "has the KL budget 0.5, not 1"),
        (["budgets", f"--group=wide={good}"], "a budget is a number"),
    ]
    (tmp_path / "docs").mkdir()
    for arguments, wants in cases:
        refusal(capsys, tmp_path / "docs" / "page", *arguments, wants=wants)


def test_a_folder_of_something_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refusal(capsys, tmp_path / "mine", "seeds", "--runs", run, wants="in use by something else")
    refusal(capsys, tmp_path / "a.md", "seeds", "--runs", run, wants="leave out the .md")


def test_a_label_ends_at_its_last_equals_sign(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    groups = read_groups([f"QAM beta=3={runs[0]},{runs[1]}"])
    assert [run.name for run in groups["QAM beta=3"]] == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        read_groups([f"A={runs[0]}", f"A={runs[1]}"])


def test_the_report_that_the_recipe_writes_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    write_report(
        folder,
        config={"seed": 0},
        evaluation=outcomes(10, 16),
        metrics_path=folder / "metrics.jsonl",
        step=100,
        wall_clock={"offline": 8.0},
        title="QAM on Can",
        command=f"accelerate launch {MACHINE}/recipes/finetune_robomimic.py",
    )
    run = read_run(folder)
    assert (run.title, run.wall_clock) == ("QAM on Can", {"offline": 8.0})
    assert run.provenance["command"] == "accelerate launch recipes/finetune_robomimic.py"
    assert run.provenance["versions"]["torch"]


def test_a_run_tells_its_seed_unit_and_base(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", seed=7))
    assert (run.name, run.seed, run.kl_unit) == ("a", 7, "nats per action")
    # SHA-256 of b"weights", by coreutils.
    assert run.base_weights.startswith("9a129038d9a00aed")

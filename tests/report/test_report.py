"""The report says what the evaluation and the metrics hold, and how the run was made."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_results.combined_runs import comparison_table

from vla_trqam.report import provenance
from vla_trqam.report.evaluation import BaseAsItCame, PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.page import write_json, write_report


def make_evaluation(both, tuned_only, base_only, neither):
    tuned = [True] * (both + tuned_only) + [False] * (base_only + neither)
    base = [True] * both + [False] * tuned_only + [True] * base_only + [False] * neither
    count = len(base)
    return PairedEvaluation(
        np.arange(1000, 1000 + count), base, tuned, np.full(count, 9), np.full(count, 8)
    )


@pytest.fixture
def run(tmp_path):
    """A finished run's folder: metrics, a figure, a video."""
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(10):
            values = {"kl_ema": 0.1 if step else 0.0, "kl_budget": 0.1, "lam": 0.5}
            log.log(step, "offline", values | {"lam_min": 0.01, "lam_max": 10.0})
    for name in ("plots/kl.png", "videos/base and tuned.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def report(run, evaluation=None, **changes):
    arguments = {
        "config": {"seed": 3, "trqam": {"kl_budget": 0.1, "kl_clip": math.inf}, "out": Path("a/b")},
        "evaluation": evaluation or make_evaluation(20, 12, 2, 16),
        "metrics_path": run / "metrics.jsonl",
        "step": 700,
        "wall_clock": {"pretrain": 62.4, "offline": 600.0},
        "plots": [run / "plots/kl.png"],
        "videos": [run / "videos/base and tuned.mp4"],
        "title": "TRQAM on Lift",
        "seeds": {"training": 3},
        "command": "accelerate launch recipes/finetune_robomimic.py --seed=3",
        "kl_unit": "nats per action",
    }
    path = write_report(run, **(arguments | changes))
    return path.read_text(encoding="utf-8"), json.loads((run / "report.json").read_text())


def test_the_report_gives_rates_difference_and_their_published_interval(run):
    text, _ = report(run)
    assert "base 44.0% → tuned 64.0%** on 50 fixed initial states" in text
    # Newcombe's own example for method 10: 0.0562 to 0.3292.
    assert "| difference | +20.0 points | +5.6 to +32.9 points |" in text
    assert "| tuned | 64.0% | 50.1% to 75.9% | 32 of 50 |" in text
    assert "the tuned policy is better" in text


def with_base_as_it_came(evaluation, solved):
    """The same, where the base came with 10 flow steps and then solves the first so many states."""
    count = len(evaluation)
    came = BaseAsItCame(np.arange(count) < solved, np.full(count, 9), FlowSteps(10, 4))
    return replace(evaluation, as_it_came=came)


def test_the_report_tells_what_fewer_steps_make_from_what_tuning_makes(run):
    # The base solves the first 20 states and two of the others, the tuned policy the first 32.
    evaluation = with_base_as_it_came(make_evaluation(20, 12, 2, 16), 16)
    text, raw = report(run, evaluation, flow_steps=FlowSteps(10, 4))
    assert (
        "**Success: base as it came 32.0%, with the tuned flow steps 44.0% → tuned 64.0%** on 50 "
        "fixed initial states. The interval of the gain of tuning excludes zero: the tuned policy "
        "is better. The base came with 10 flow steps: fewer steps alone make +12.0 points (95% "
        "interval +2.2 to +21.4); with tuning, in total, +32.0 points (95% interval +17.8 to "
        "+43.9)."
    ) in text
    assert "| base as it came, 10 flow steps | 32.0% | 20.8% to 45.8% | 16 of 50 |" in text
    assert "| base, 4 flow steps | 44.0% | 31.2% to 57.7% | 22 of 50 |" in text
    assert "| tuned, 4 flow steps | 64.0% | 50.1% to 75.9% | 32 of 50 |" in text
    assert "| gain of tuning | +20.0 points | +5.6 to +32.9 points | 12 gained, 2 lost |" in text
    assert "| fewer steps alone | +12.0 points |" in text
    assert "| in total | +32.0 points |" in text
    assert raw["flow_steps"] == {"own": 10, "tuned": 4}
    assert raw["evaluation"]["base_as_it_came"]["rate"] == 0.32


def test_no_effect_of_the_steps_is_claimed_where_its_interval_includes_zero(run):
    text, _ = report(run, with_base_as_it_came(make_evaluation(20, 12, 2, 16), 21))
    assert re.search(r"fewer steps alone make \+2.0 points \([^)]*\), so no difference is", text)


def test_a_report_without_evaluation_names_both_numbers_of_flow_steps(run):
    path = write_report(
        run,
        config={},
        evaluation=None,
        metrics_path=run / "metrics.jsonl",
        step=700,
        wall_clock={},
        command="x",
        flow_steps=FlowSteps(5, 2),
    )
    text, raw = path.read_text(), json.loads((run / "report.json").read_text())
    assert "Not evaluated" in text
    assert "- flow steps: 2; the base came with 5" in text
    assert raw["flow_steps"] == {"own": 5, "tuned": 2}


@pytest.mark.parametrize(
    ("table", "claim"),
    [((20, 3, 2, 25), "no difference is shown"), ((20, 2, 12, 16), r"is \*\*worse\*\*")],
)
def test_the_report_claims_a_gain_only_where_the_interval_excludes_zero(run, table, claim):
    text, _ = report(run, make_evaluation(*table))
    assert re.search(claim, text)
    assert "is better" not in text


def test_the_report_lists_the_episodes_gained_and_lost(run):
    text, raw = report(run, make_evaluation(1, 2, 1, 1))
    assert "- gained: 2 (seeds 1001, 1002)" in text
    assert "- lost: 1 (seeds 1003)" in text
    assert raw["evaluation"]["gained"] == [1001, 1002]


def test_the_report_tells_how_the_kl_followed_its_budget(run):
    text, raw = report(run)
    assert "The KL followed its budget" in text
    assert "| KL budget (nats per action) | 0.1 |" in text
    assert "| final λ | 0.5 |" in text
    assert raw["trust_region"]["share_within"] == 1.0
    assert raw["final_metrics"]["offline"]["lam"] == 0.5


def test_a_run_without_trust_region_says_so(run):
    path = run / "other.jsonl"
    with MetricsLog(path) as log:
        log.log(1, "offline", {"td_loss": 1.0})
    text, raw = report(run, metrics_path=path)
    assert "no trust region" in text
    assert raw["trust_region"] is None


def test_links_are_relative_and_lead_to_the_files(run):
    text, _ = report(run)
    assert "![KL from the base policy, and its budget](plots/kl.png)" in text
    assert "(videos/base%20and%20tuned.mp4)" in text
    with pytest.raises(ValueError, match=r"missing\.png"):
        report(run, plots=[run / "missing.png"])


def test_the_report_says_how_the_run_was_made(run):
    text, raw = report(run)
    assert "accelerate launch recipes/finetune_robomimic.py --seed=3" in text
    assert "- training seed: 3" in text
    assert "50 seeds, 1000 to 1049" in text
    assert "| pretrain | 1 min 02 s |" in text
    assert "| **total** | 11 min 02 s |" in text
    assert raw["provenance"]["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", raw["provenance"]["versions"]["robosuite"])
    assert raw["config"]["out"] == "a/b"


def test_the_raw_numbers_rebuild_the_evaluation(run):
    evaluation = make_evaluation(20, 12, 2, 16)
    _, raw = report(run, evaluation)
    again = PairedEvaluation.from_json(raw["evaluation"])
    np.testing.assert_array_equal(again.tuned_success, evaluation.tuned_success)


def test_json_with_infinities_is_valid_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": [math.inf, float("nan")]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": ["Infinity", "NaN"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": ["Infinity", "NaN"]}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_the_comparison_table_names_the_median_and_the_worst_seed():
    better = [make_evaluation(5, 4, 0, 1), make_evaluation(5, 5, 0, 0), make_evaluation(5, 0, 1, 4)]
    table = comparison_table({"TRQAM": better, "QAM": [make_evaluation(5, 0, 0, 5)]})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ";".join(rows[2][:5]) == "TRQAM;3;53.3%;90.0%;50.0% (-10.0 points)"
    assert rows[2][5] == "+26.7 points"
    assert ";".join(rows[3][:5]) == "QAM;1;50.0%;50.0%;50.0% (+0.0 points)"
    assert rows[3][6] == "+0.0 to +0.0 points"


def test_the_recorded_command_line_is_the_one_that_ran(tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("from vla_trqam.report.provenance import command_line\nprint(command_line())")
    done = subprocess.run(
        [sys.executable, str(script), "--name=a b"], capture_output=True, text=True, check=True
    )
    name, *arguments = shlex.split(done.stdout)
    assert name == Path(sys.executable).name
    assert arguments == [str(script), "--name=a b"]


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_tells_uncommitted_changes_and_foreign_repositories_apart(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("a = 1")
    assert provenance.git_commit(package) is None  # no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("x")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-qm", "other")
    assert provenance.git_commit(package) is None  # installed inside somebody else's repository
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "package")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_commit(package) == commit
    (package / "code.py").write_text("a = 2")
    assert provenance.git_commit(package) == f"{commit} and uncommitted changes"

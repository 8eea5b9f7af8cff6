"""The run's record: written line by line, resumed without a trace, read back as it was."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from vla_trqam.errors import UserError
from vla_trqam.report.metrics import (
    MetricsLog,
    join_phases,
    read_metrics,
    summarise_trust_region,
)
from vla_trqam.report.progress import TrainingProgress, status_text


class Clock:
    """Seconds that advance by one at each look."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        self.now += 1
        return self.now


def write_run(path, steps, lam=1.0):
    with MetricsLog(path, clock=Clock()) as log:
        for step in steps:
            log.log(step, "offline", {"lam": lam, "kl_ema": step / 10})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_step_phase_time_and_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"lam": 0.25, "episodes": np.int64(20), "success": np.bool_(True)}
    with MetricsLog(path, clock=Clock()) as log:
        log.log(40, "online", values | {"td_loss": np.float32(0.5)})
    (line,) = lines_of(path)
    expected = {"step": 40, "phase": "online", "time": 1.0, "lam": 0.25, "episodes": 20}
    assert line == expected | {"success": 1, "td_loss": 0.5}
    assert isinstance(line["episodes"], int)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from vla_trqam.report.metrics import MetricsLog;"
        "MetricsLog(Path(sys.argv[1])).log(3, 'offline', {'lam': 2.0});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert read_metrics(path)["offline"]["lam"].value.tolist() == [2.0]


def test_series_read_back_hold_only_the_lines_that_carry_the_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, clock=Clock()) as log:
        log.log(1, "offline", {"lam": 1.0})
        log.log(2, "offline", {"lam": 2.0, "td_loss": 0.1})
        log.log(2, "eval", {"success_rate": 0.5})
        log.log(3, "online", {"lam": 3.0})
    metrics = read_metrics(path)
    assert metrics["offline"]["td_loss"].step.tolist() == [2]
    assert metrics["offline"]["lam"].time.tolist() == [1.0, 2.0]
    assert "lam" not in metrics["eval"]
    joined = join_phases(metrics, "lam")
    assert (joined.step.tolist(), joined.value.tolist()) == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert len(join_phases(metrics, "unheard_of")) == 0


def test_non_finite_numbers_keep_the_file_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step, value in enumerate([math.nan, math.inf, -math.inf]):
            log.log(step, "offline", {"adjoint_loss": value})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    np.testing.assert_array_equal(
        read_metrics(path)["offline"]["adjoint_loss"].value, [np.nan, np.inf, -np.inf]
    )


def test_names_that_every_line_carries_cannot_be_logged(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="step"):
        log.log(1, "offline", {"step": 2.0})


def test_a_new_log_does_not_touch_an_existing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(3))
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists"):
        MetricsLog(path)
    assert path.read_bytes() == before


def test_an_interrupted_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_run(whole, range(10))
    write_run(resumed, range(7))  # the checkpoint was saved at step 4: steps 5 and 6 are lost
    with resumed.open("ab") as file:
        file.write(b'{"step": 7, "phase": "offl')
    with MetricsLog.resume_after_line(resumed, 5, clock=Clock(start=77.0)) as log:
        for step in range(5, 10):
            log.log(step, "offline", {"lam": 1.0, "kl_ema": step / 10})
    assert resumed.read_bytes() == whole.read_bytes()
    assert log.num_lines == 10


def test_resuming_before_the_first_line_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(3))
    with MetricsLog.resume_after_line(path, 0, clock=Clock()) as log:
        log.log(9, "offline", {})
    assert lines_of(path) == [{"step": 9, "phase": "offline", "time": 1.0}]


def test_resuming_a_log_that_ends_before_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(3))
    with pytest.raises(UserError, match=r"3 complete lines.*after 4"):
        MetricsLog.resume_after_line(path, 4)
    with pytest.raises(UserError, match="does not exist"):
        MetricsLog.resume_after_line(tmp_path / "missing.jsonl", 4)


def test_a_half_written_last_line_is_left_out_when_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(3))
    with path.open("ab") as file:
        file.write(b'{"step": 3, "phase": "offline", "time": 4.0, "lam": 1')
    assert read_metrics(path)["offline"]["lam"].step.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"step": 1}', '{"step": 1, "phase": "x", "time": 0, "a": "b"}']
)
def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(2))
    with path.open("a") as file:
        file.write(line + '\n{"step": 2, "phase": "offline", "time": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3"):
        read_metrics(path)


def trust_region_run(tmp_path, ema, lam, bounds=(0.01, 10.0)):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step, (kl, multiplier) in enumerate(zip(ema, lam, strict=True)):
            values = {"kl_ema": kl, "kl_budget": 0.1, "lam": multiplier}
            log.log(step, "offline", values | {"lam_min": bounds[0], "lam_max": bounds[1]})
    return summarise_trust_region(read_metrics(path))


def test_the_budget_is_held_when_the_last_half_is_within_a_fifth(tmp_path):
    summary = trust_region_run(tmp_path, [0.0, 5.0, 0.1, 0.119, 0.081], [1.0, 1.0, 1.0, 2.0, 3.0])
    assert summary.held
    assert summary.share_within == 1.0
    assert summary.worst_relative_error == pytest.approx(0.19)
    assert summary.kl_ema_mean == pytest.approx(0.1)
    assert (summary.lam_final, summary.kl_budget) == (3.0, 0.1)


def test_the_line_in_the_very_middle_belongs_to_the_last_half(tmp_path):
    summary = trust_region_run(tmp_path, [0.1, 0.1, 0.16, 0.1, 0.1], [1.0] * 5)
    assert not summary.held
    assert summary.share_within == pytest.approx(2 / 3)


def test_the_budget_is_not_held_when_a_late_line_is_off_and_lambda_is_free(tmp_path):
    summary = trust_region_run(tmp_path, [0.1] * 5 + [0.13], [1.0] * 6)
    assert not summary.held
    assert summary.share_within == pytest.approx(2 / 3)


def test_lines_with_lambda_on_a_bound_are_excused_and_counted(tmp_path):
    lam = [1.0, 1.0, 1.0, 0.01, 0.01, 10.0]
    summary = trust_region_run(tmp_path, [0.1, 0.1, 0.1, 0.02, 0.02, 3.0], lam)
    assert summary.held
    assert summary.share_on_lower_bound == pytest.approx(2 / 3)
    assert summary.share_on_upper_bound == pytest.approx(1 / 3)
    assert summary.share_within == 0.0
    assert math.isnan(summary.worst_relative_error)


def test_a_diverged_kl_does_not_count_as_held(tmp_path):
    assert not trust_region_run(tmp_path, [0.1, 0.1, math.nan], [1.0] * 3).held


def test_a_run_without_trust_region_has_no_summary(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, "offline", {"td_loss": 1.0})
    assert summarise_trust_region(read_metrics(path)) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_prints_lines_at_the_interval_where_there_is_no_terminal():
    clock, stream = Clock(), io.StringIO()
    progress = TrainingProgress(200, "offline", stream=stream, line_interval=50, clock=clock)
    with progress:
        progress.update(1, {"success_rate": 0.47})
        for step in range(2, 121):
            progress.update(step, {"kl_ema": 0.09, "kl_budget": 0.1, "lam": 0.31, "q_mean": -12})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # 120 seconds at one every 50, and the last state
    assert lines[-1].startswith("offline: 120/200 (60%), ")
    assert lines[-1].endswith("success 47%, KL 0.09/0.1, λ 0.31, Q -12")
    assert "\r" not in stream.getvalue()


def test_progress_draws_a_bar_on_a_terminal():
    stream = Terminal()
    with TrainingProgress(10, "offline", stream=stream, initial=4) as progress:
        progress.update(7, {"kl_estimate": 0.2, "lam": 1.5})
    assert "7/10" in stream.getvalue()
    assert "KL 0.2, λ 1.5" in stream.getvalue()


def test_progress_rate_counts_only_the_updates_since_the_start():
    stream = io.StringIO()
    clock = Clock()
    with TrainingProgress(100, "online", stream=stream, initial=90, clock=clock) as progress:
        progress.update(100, {})
    seconds = float(clock.now - 1001)
    assert f"{10 / seconds:.1f} updates/s" in stream.getvalue()


def test_status_shows_the_bc_loss_only_while_there_is_no_kl():
    assert status_text({"bc_loss": 0.5}) == "BC loss 0.5"
    assert status_text({"bc_loss": 0.5, "kl_ema": 0.1}) == "KL 0.1"
    assert status_text({}) == ""

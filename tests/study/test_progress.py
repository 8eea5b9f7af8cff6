"""The one line that is shown of a study."""

import io
import json

from fake_steps import fake

from vla_trqam.study.plan import Step
from vla_trqam.study.progress import StudyProgress, line_of, newest, work
from vla_trqam.study.scheduler import Standing


def step(folder, name, updates, phases=("offline", "online")):
    return Step(name, (), folder / name, folder / name / "report.json", (), None, updates, phases)


def log(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"time": 0.0, **record}) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"half')


def standing_of(tmp_path):
    run = step(tmp_path, "lift/trqam_s0", 1000)
    log(
        run.folder,
        {"step": 300, "phase": "pretrain", "bc_loss": 1.0},
        {"step": 0, "phase": "eval", "success_rate": 0.25},
        {"step": 400, "phase": "offline", "kl_ema": 0.4, "kl_budget": 0.5, "lam": 2.0},
        {"step": 400, "phase": "eval", "success_rate": 0.45},
    )
    done, waiting = step(tmp_path, "lift/base_s0", 300, ("pretrain",)), step(tmp_path, "x", 1000)
    standing = Standing([done, run, waiting], done={done.name}, running={run.name: run})
    return standing, run


def test_a_line_says_how_many_are_done_and_what_each_run_does(tmp_path):
    standing, _ = standing_of(tmp_path)
    line = line_of(standing, 4800.0)
    assert line.split(" | ") == [
        "1/3 steps done",
        "lift/trqam_s0 offline 400/1000, success 45%, KL 0.4/0.5, λ 2",
        "1:20 h left",
    ]


def test_failed_and_left_out_are_counted(tmp_path):
    standing, _ = standing_of(tmp_path)
    standing.failed["x"] = "why"
    assert line_of(standing, None).startswith("1/3 steps done, 1 failed | lift")


def test_a_run_that_has_only_the_log_of_its_base_has_done_nothing_yet(tmp_path):
    run = step(tmp_path, "run", 1000)
    log(run.folder, {"step": 300, "phase": "pretrain", "bc_loss": 1.0})
    standing = Standing([run], running={run.name: run})
    assert line_of(standing, None) == "0/1 steps done | run begins"
    assert work(standing) == (0, 1500)


def test_work_counts_updates_and_a_share_for_each_step(tmp_path):
    standing, _ = standing_of(tmp_path)
    assert work(standing) == (800 + 400, 1100 + 1500)
    standing.failed["x"] = "why"
    assert work(standing) == (800 + 400, 1100)


def test_the_time_left_is_by_the_work_since_the_first_look(tmp_path):
    standing, run = standing_of(tmp_path)
    stream, now = io.StringIO(), [0.0]
    progress = StudyProgress(stream, clock=lambda: now[0])
    progress.show(standing)
    log(run.folder, {"step": 800, "phase": "offline"})
    now[0] = 60.0
    progress.show(standing)
    # 400 updates in a minute, and 700 + 1500 are left.
    assert [line.rpartition(" | ")[2] for line in stream.getvalue().splitlines()] == [
        "lift/trqam_s0 offline 400/1000, success 45%, KL 0.4/0.5, λ 2",
        "0:06 h left",
    ]
    now[0] = 90.0
    progress.show(standing)
    assert stream.getvalue().count("\n") == 2, "a line a minute"


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    log(tmp_path, *({"step": n, "phase": "offline", "lam": n} for n in range(5000)))
    assert newest(tmp_path) == (4999, "offline", {"time": 0.0, "lam": 4999.0})
    assert newest(tmp_path / "none") == (0, "", {})
    assert fake(tmp_path, "x").updates == 0

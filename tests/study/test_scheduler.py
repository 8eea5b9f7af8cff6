"""The scheduler on fake runs: side by side, killed, failing, gone on with."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_steps import calls, fake, span

from vla_trqam.engine.folder.run_lock import RunLock
from vla_trqam.study.scheduler import Scheduler, visible_gpus, why


def run(steps, folder, workers=2, **more):
    scheduler = Scheduler(steps, workers=workers, logs=folder / "logs", tick=0.01, **more)
    return scheduler.run(), scheduler.standing


def test_runs_go_side_by_side_and_each_after_what_it_needs(tmp_path):
    base = fake(tmp_path, "base", 0.1)
    steps = [base, *(fake(tmp_path, name, 0.4, needs=["base"]) for name in ("a", "b"))]
    whole, standing = run(steps, tmp_path)
    assert whole
    assert standing.done == {"base", "a", "b"}
    ends = {name: span(tmp_path, name) for name in ("base", "a", "b")}
    assert ends["a"][0] >= ends["base"][1] <= ends["b"][0]
    assert ends["a"][0] < ends["b"][1]
    assert ends["b"][0] < ends["a"][1], "the two overlap in time"


def test_each_run_has_the_gpu_that_fewest_others_have(tmp_path):
    steps = [fake(tmp_path, name, 0.6) for name in "abcd"]
    run(steps, tmp_path, workers=4, devices=("4", "7"))
    had = sorted((tmp_path / name / "gpu.txt").read_text() for name in "abcd")
    assert had == ["4", "4", "7", "7"]


def test_the_gpus_are_those_that_the_variable_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7f")
    assert visible_gpus() == ("2", "GPU-7f")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ("0", "1")


def test_one_worker_runs_one_after_the_other(tmp_path):
    run([fake(tmp_path, name, 0.1) for name in ("a", "b")], tmp_path, workers=1)
    assert span(tmp_path, "a")[1] <= span(tmp_path, "b")[0]


def test_a_finished_run_is_not_made_again_and_a_begun_one_is_resumed(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done/report.json").write_text("{}")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text("")
    steps = [fake(tmp_path, name) for name in ("done", "begun", "other")]
    _, standing = run(steps, tmp_path)
    assert standing.done == {"done", "begun", "other"}
    assert calls(tmp_path, "done") == []
    assert calls(tmp_path, "begun") == ["resumed"]
    assert calls(tmp_path, "other") == ["new"]


def test_a_failed_run_is_told_in_a_sentence_and_the_rest_goes_on(tmp_path):
    said: list[str] = []
    steps = [
        fake(tmp_path, "bad", mode="fails"),
        fake(tmp_path, "needs_bad", needs=["bad"]),
        fake(tmp_path, "needs_that", needs=["needs_bad"]),
        fake(tmp_path, "good"),
    ]
    whole, standing = run(steps, tmp_path, say=said.append)
    assert whole
    assert standing.done == {"good"}
    assert standing.failed == {"bad": "the data is no data"}
    assert standing.left_out == {"needs_bad", "needs_that"}
    assert said == [f"bad failed: the data is no data ({tmp_path}/logs/bad.log)"]
    assert calls(tmp_path, "needs_bad") == []


def test_why_is_of_the_last_attempt_and_says_what_is_known_without_a_sentence(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: an old one\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback\nZeroDivisionError: division by zero\n")
    assert why(log, 1, start) == "it ended with status 1: ZeroDivisionError: division by zero"
    assert why(log, 1) == "an old one"
    assert why(log, -signal.SIGKILL, start) == "it was ended by SIGKILL"
    log.write_text("")
    assert why(log, 3) == "it ended with status 3: it printed nothing"


def _outside(folder):
    steps = [fake(folder, name, 30) for name in "abc"]
    whole = Scheduler(steps, workers=2, logs=folder / "logs", tick=0.01).run()
    os._exit(0 if whole else 130)


@pytest.fixture
def started(tmp_path):
    """A scheduler in a process of its own, two of whose three runs have begun."""
    process = multiprocessing.get_context("fork").Process(target=_outside, args=(tmp_path,))
    process.start()
    until(lambda: all((tmp_path / name / "config.yaml").exists() for name in "ab"))
    yield process
    process.kill()
    process.join()


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(folder):
    """Processes with the folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in words and int(path.parts[2]) != os.getpid():
            found.append(path.parts[2])
    return found


@pytest.mark.slow
def test_ctrl_c_lets_every_run_save_and_the_same_command_goes_on(started, tmp_path):
    os.kill(started.pid, signal.SIGINT)
    started.join(30)
    assert started.exitcode == 130
    assert (tmp_path / "a/saved.txt").exists()
    assert (tmp_path / "b/saved.txt").exists()
    assert calls(tmp_path, "c") == [], "nothing new was begun"
    steps = [fake(tmp_path, name) for name in "abc"]
    _, standing = run(steps, tmp_path)
    assert standing.done == set("abc")
    assert calls(tmp_path, "a") == ["new", "resumed"]
    assert calls(tmp_path, "c") == ["new"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_killed_scheduler_leaves_no_orphans_and_the_same_command_goes_on(started, tmp_path):
    started.kill()
    started.join()
    until(lambda: not alive(tmp_path))
    assert (tmp_path / "a/saved.txt").exists()
    _, standing = run([fake(tmp_path, name) for name in "abc"], tmp_path)
    assert standing.done == set("abc")
    assert calls(tmp_path, "b") == ["new", "resumed"]


@pytest.mark.parametrize("finishes", [True, False])
def test_a_run_that_another_process_is_at_work_on_is_waited_for(tmp_path, finishes):
    """As an orphan of a killed study is, which ends its update first; it may even have finished."""
    steps = [fake(tmp_path, name) for name in ("taken", "other")]
    folder = steps[0].folder
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.take()

    def end():
        until(steps[1].done.exists)
        time.sleep(0.1)
        if finishes:
            steps[0].done.write_text("{}")
        lock.release()

    orphan = threading.Thread(target=end)
    orphan.start()
    said = []
    whole, standing = run(steps, tmp_path, say=said.append)
    orphan.join()
    assert whole
    assert said == [f"taken waits: another process is at work in {folder}"]
    assert standing.done == {"taken", "other"}
    assert calls(tmp_path, "taken") == ([] if finishes else ["new"])


def test_an_orphan_takes_a_workers_place(tmp_path):
    """Of two workers one waits for it: no more than two runs are ever under way."""
    steps = [fake(tmp_path, name) for name in ("taken", "first", "second")]
    steps[0].folder.mkdir(parents=True)
    lock = RunLock(steps[0].folder)
    lock.take()
    at_once = []

    def end():
        until(steps[1].done.exists)
        steps[0].done.write_text("{}")
        lock.release()

    orphan = threading.Thread(target=end)
    orphan.start()
    whole, standing = run(
        steps, tmp_path, workers=2, show=lambda now: at_once.append(len(now.running))
    )
    orphan.join()
    assert whole
    assert standing.done == {"taken", "first", "second"}
    assert max(at_once) == 1

"""The run's folder: one run's alone, and as it was if nothing comes of the run."""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.engine.folder import own_folder as own_folder_module
from vla_trqam.engine.folder import run_lock
from vla_trqam.engine.folder.begun import Begun
from vla_trqam.engine.folder.own_folder import check_output_dir, own_folder
from vla_trqam.engine.folder.run_lock import LOCK_NAME, RunLock
from vla_trqam.engine.processes.team import FailedElsewhereError, Team
from vla_trqam.errors import DivergenceError, UserError

HOLD = """
import sys, time
from pathlib import Path
from vla_trqam.engine.folder.run_lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""
FAILURES = [RuntimeError, KeyError, MemoryError, OSError, KeyboardInterrupt, SystemExit, UserError]


@dataclass
class Settings:
    output_dir: Path
    resume: bool = False
    checkpoint: str | None = None
    num_threads: int | None = None
    steps: int = field(default=3)
    GROWING: ClassVar[dict[str, str]] = {}


@pytest.fixture(autouse=True)
def with_as_many_updates(monkeypatch):
    monkeypatch.setattr(own_folder_module, "save_more_updates", lambda _: None)


def fail(settings, error, *made):
    """A run that makes files and folders (whose names end in /), and then fails."""
    with own_folder(settings):
        for name in made:
            path = settings.output_dir / name
            if name.endswith("/"):
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_text("new")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_a_new_run_wants_an_empty_folder(tmp_path):
    check_output_dir(tmp_path / "new", resume=False)
    check_output_dir(tmp_path, resume=False)
    # A merged base is gigabytes, and written before the settings.
    for left_by_a_kill in (LOCK_NAME, "inputs.json", "command.txt", ".part.config.yaml"):
        (tmp_path / left_by_a_kill).touch()
    for folder in (".part.base_policy", "base_policy"):
        (tmp_path / folder).mkdir()
    check_output_dir(tmp_path, resume=False)
    (tmp_path / "file").write_text("x")
    check_output_dir(tmp_path, resume=True)
    with pytest.raises(UserError, match=r"is in use; choose another --output_dir$"):
        check_output_dir(tmp_path, resume=False)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="or go on with that run by --resume=true"):
        check_output_dir(tmp_path, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(resume, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"another process is at work in {tmp_path};"),
            own_folder(Settings(tmp_path, resume=resume)),
        ):
            pytest.fail("two runs in one folder")
        assert names(tmp_path) == [LOCK_NAME]
        first.kill()
    with own_folder(Settings(tmp_path, resume=resume)):
        assert LOCK_NAME in names(tmp_path)
    assert names(tmp_path) == []


def test_a_subprocess_does_not_hold_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as child:
        time.sleep(0.3)
        lock.release()
        again = RunLock(tmp_path)
        again.take()
        assert child.poll() is None
        child.kill()
    again.release()


def test_a_lock_whose_file_was_removed_in_between_is_taken_again(tmp_path, monkeypatch):
    flock, calls = run_lock.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    lock = RunLock(tmp_path)
    lock.take()
    assert len(calls) == 2
    with pytest.raises(UserError, match="another process"):
        RunLock(tmp_path).take()
    lock.release()


@pytest.mark.parametrize("error", FAILURES)
def test_whatever_fails_before_the_first_checkpoint_leaves_no_folder(error, tmp_path):
    folder = tmp_path / "outputs" / "day" / "run"
    with pytest.raises(error):
        fail(Settings(folder), error, "replay/rewards.npy", "config.yaml")
    assert names(tmp_path) == []


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("error", [*FAILURES, FailedElsewhereError, DivergenceError])
def test_data_that_were_read_stay_but_for_what_the_preflight_refuses(error, checked, tmp_path):
    """And what failed on another process may have been no refusal."""
    folder = tmp_path / "run"
    with pytest.raises(error):
        fail_reading(folder / "replay", error, "config.yaml", checked=checked)
    gone = error is DivergenceError or (error is UserError and not checked)
    assert folder.exists() == (folder / "replay").exists() == (not gone)


def test_data_of_a_run_without_settings_cannot_be_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_reading(tmp_path / "run" / "replay_1", KeyboardInterrupt)
    assert names(tmp_path) == []


def fail_reading(path, error, *made, checked=False):
    """A run that fails when it has begun to read its data."""
    with own_folder(Settings(path.parent)):
        for name in made:
            (path.parent / name).touch()
        replay = Replay.create(path, observation_dim=1, action_dim=1, capacity=1)
        Begun.of(Team(), replay, checked=checked).write(path)
        replay.close()
        raise error("what")


@pytest.mark.parametrize("error", FAILURES)
def test_an_empty_folder_of_the_users_stays(error, tmp_path):
    with pytest.raises(error):
        fail(Settings(tmp_path), error, "config.yaml")
    assert names(tmp_path) == []


def test_only_what_the_run_made_is_removed(tmp_path):
    (tmp_path / "outputs").mkdir()
    with pytest.raises(KeyError):
        fail(Settings(tmp_path / "outputs" / "run"), KeyError, "../neighbour/")
    assert names(tmp_path / "outputs") == ["neighbour"]
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="in use"), own_folder(Settings(tmp_path)):
        pytest.fail("a folder in use")
    assert names(tmp_path) == ["notes.txt", "outputs"]


@pytest.mark.parametrize("error", FAILURES)
def test_after_the_first_checkpoint_nothing_is_removed(error, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(error):
        fail(Settings(folder), error, "checkpoints/000001/", "config.yaml")
    assert names(folder) == ["checkpoints", "config.yaml"]


def test_a_half_written_checkpoint_is_none(tmp_path):
    with pytest.raises(KeyError):
        fail(Settings(tmp_path / "run"), KeyError, "checkpoints/.part.000001/")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), own_folder(Settings(tmp_path / "file")):
        pytest.fail("a file is no folder")
    with (
        pytest.raises(UserError, match="cannot be made: Not a directory"),
        own_folder(Settings(tmp_path / "file" / "run")),
    ):
        pytest.fail("a file holds no folder")


def test_a_resume_without_checkpoint_begins_anew_and_keeps_what_is_there(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "config.yaml").touch()
        (tmp_path / "command.txt").touch()
        (tmp_path / "inputs.json").write_text("{}")
        (tmp_path / "base_policy").mkdir(exist_ok=True)
        (tmp_path / "metrics.jsonl").write_text(f"line of {number}\n")
        (tmp_path / "replay").mkdir()
        (tmp_path / "replay" / "replay.json").write_text(str(number))
        with own_folder(Settings(tmp_path, resume=True)):
            kept = tmp_path / f"before_restart_{number}"
            assert (kept / "metrics.jsonl").read_text() == f"line of {number}\n"
            assert (kept / "replay" / "replay.json").read_text() == str(number)
            aside = [f"before_restart_{n + 1}" for n in range(number)]
            settings = ["base_policy", "command.txt", "config.yaml", "inputs.json", LOCK_NAME]
            assert names(tmp_path) == sorted([*aside, *settings])
        said = capsys.readouterr().out
        assert said == (
            f"{tmp_path} has no checkpoint, so the run begins anew; what was there "
            f"(metrics.jsonl, replay) is kept in {kept}\n"
        )


def test_a_failed_beginning_anew_removes_only_its_own(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text("old")
    with pytest.raises(KeyError):
        fail(Settings(tmp_path, resume=True), KeyError, "metrics.jsonl", "replay/replay.json")
    assert names(tmp_path) == ["before_restart_1", "config.yaml"]
    assert (tmp_path / "before_restart_1" / "metrics.jsonl").read_text() == "old"

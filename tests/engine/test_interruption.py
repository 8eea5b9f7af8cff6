import os
import pty
import signal
import sys
import threading
from pathlib import Path

import pytest

from vla_trqam.engine.processes import interruption
from vla_trqam.engine.processes.interruption import (
    LAUNCHER_DIED,
    InterruptGuard,
    how_to_go_on,
    is_launcher,
    stops_as_ctrl_c,
)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_says_so(which, capfd):
    with InterruptGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), which)
        assert guard.requested
    assert "stopping after this update" in capfd.readouterr().err


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_acts(which):
    with InterruptGuard():
        os.kill(os.getpid(), which)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), which)


def test_one_wish_to_stop_that_comes_as_two_signals_only_asks(monkeypatch):
    """A batch system signals every process of a job, and so does the study that is one of them."""
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.requested
        monkeypatch.setattr(interruption, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_come_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with InterruptGuard():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_middle_of_printing_does_no_harm(capfd):
    """`print` in a handler fails when it lands in another `print`; this message must not."""
    with InterruptGuard() as guard:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        while not guard.requested:
            print("x" * 1000, file=sys.stderr, flush=True)
    assert "stopping after this update" in capfd.readouterr().err


IN_A_TERMINAL = """
import sys
import time
from pathlib import Path
from vla_trqam.engine.processes.interruption import InterruptGuard

saved = Path(sys.argv[1])
with InterruptGuard() as guard:
    print("training", flush=True)
    until = time.monotonic() + 60
    while not guard.requested and time.monotonic() < until:
        time.sleep(0.01)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    saved.write_text("whole" if guard.requested else "not asked")
"""


def test_a_run_whose_terminal_is_gone_saves(tmp_path):
    """A terminal that hung up takes nothing more: what is printed fails."""
    saved = tmp_path / "saved"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", IN_A_TERMINAL, str(saved)])
    assert b"training" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert saved.read_text() == "whole"


def test_a_closing_terminal_asks_and_never_acts(capfd, monkeypatch):
    with stops_as_ctrl_c(), InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGHUP)
        assert guard.requested
        # The shell, the kernel and the launcher's end all send their own.
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), LAUNCHER_DIED)
        monkeypatch.setattr(interruption, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after this update") == 1


def test_what_a_closing_terminal_brings_along_does_not_cut_the_end_short():
    with stops_as_ctrl_c():
        with InterruptGuard():
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), LAUNCHER_DIED)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_under_nohup_a_closing_terminal_is_still_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops_as_ctrl_c(), InterruptGuard() as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not guard.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_what_torchrun_sends_on_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.requested
        monkeypatch.setattr(interruption, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP, LAUNCHER_DIED])
def test_outside_of_training_every_stop_is_an_exception_once(which):
    before = signal.getsignal(which)
    with stops_as_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), which)
        os.kill(os.getpid(), which)  # the tidying goes on
    assert signal.getsignal(which) == before


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["python", "/venv/bin/accelerate", "launch", "recipes/finetune_pi0.py"], True),
        (["python", "-m", "accelerate.commands.launch", "-q"], True),
        (["python", "-u", "/venv/bin/torchrun", "--nproc_per_node=2"], True),
        (["bash", "-c", "nohup python recipes/finetune_pi0.py &"], False),
        (["python", "recipes/sweep.py", "--with", "x", "accelerate"], False),
        ([""], False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(words, launches, monkeypatch):
    line = "\0".join(words).encode()
    monkeypatch.setattr(Path, "read_bytes", lambda _: line)
    assert is_launcher(17) == launches
    monkeypatch.undo()
    assert not is_launcher(2**31 - 1)


def test_a_launcher_that_died_before_it_was_asked_about_ends_the_run(monkeypatch):
    parents = iter([17, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(interruption, "is_launcher", lambda process: process == 17)
    with pytest.raises(KeyboardInterrupt), stops_as_ctrl_c():
        pytest.fail("an orphan goes on")


def test_the_last_sentence_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/my recipe.py", "--seed=3"])
    text = how_to_go_on(tmp_path / "a b", "offline update 3 of 6")
    assert text == (
        "stopped at offline update 3 of 6; go on with: accelerate launch -q 'recipes/my recipe.py' "
        f"--resume=true --output_dir='{tmp_path}/a b'"
    )
    assert (
        how_to_go_on(None, "")
        == "stopped before the first checkpoint: nothing is kept, begin again"
    )

import os
import signal
import sys
import threading

import pytest

from vla_trqam.training.interruption import InterruptGuard, how_to_go_on


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_says_so(which, capfd):
    with InterruptGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), which)
        assert guard.requested
    assert "stopping after this update" in capfd.readouterr().err


def test_the_second_signal_acts():
    with InterruptGuard():
        os.kill(os.getpid(), signal.SIGTERM)
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


def test_the_last_sentence_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/my recipe.py", "--seed=3"])
    text = how_to_go_on(tmp_path / "a b", "offline update 3 of 6")
    assert text == (
        "stopped at offline update 3 of 6; go on with: accelerate launch -q 'recipes/my recipe.py' "
        f"--resume=true --output_dir='{tmp_path}/a b'"
    )
    assert how_to_go_on(None, "") == "stopped before the first checkpoint: nothing is kept, begin again"

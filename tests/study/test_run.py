"""A study as a whole, on fake runs: its page, its exit status, and going on."""

import os
import signal

import pytest
from fake_steps import calls, fake

from vla_trqam.study import run as study
from vla_trqam.study.plan import Plan
from vla_trqam.study.settings import CompareConfig


@pytest.fixture
def works(tmp_path, monkeypatch):
    """Does a study of these steps; returns its exit status."""
    table = {"lift": {"recipe": "finetune_robomimic"}}
    settings = CompareConfig(output_dir=tmp_path, tasks=("lift",), table=table, workers=2)
    monkeypatch.setattr(study, "read_results", lambda runs: [])

    def work(*steps):
        monkeypatch.setattr(study, "make_plan", lambda *_: Plan(list(steps), []))
        return study.work(settings, [], lambda *_: None, lambda *_: "the page")

    return work


def test_a_whole_study_prints_its_page_and_ends_well(works, tmp_path, capsys):
    assert works(fake(tmp_path, "a"), fake(tmp_path, "b")) == 0
    said = capsys.readouterr().out
    assert said == f"the page\npage {tmp_path}/table.md\n"
    assert (tmp_path / "commands.json").exists()


def test_a_failed_run_leaves_the_page_and_is_tried_again(works, tmp_path, capsys):
    assert works(fake(tmp_path, "a"), fake(tmp_path, "bad", mode="fails")) == 1
    out, err = capsys.readouterr()
    assert "bad failed: the data is no data" in err
    assert out.startswith("the page\n")
    assert out.endswith("1 failed; the same command tries again: bad\n")
    (tmp_path / "commands.json").unlink()
    assert works(fake(tmp_path, "a"), fake(tmp_path, "bad")) == 0
    assert calls(tmp_path, "bad") == ["fails", "new"]
    assert calls(tmp_path, "a") == ["new"]


def test_a_stopped_study_says_how_far_it_is_and_writes_no_page(
    works, tmp_path, capsys, monkeypatch
):
    asked = []

    def show(self, standing):
        if (tmp_path / "long/config.yaml").exists() and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(study.StudyProgress, "show", show)
    assert works(fake(tmp_path, "long", 30)) == 130
    assert capsys.readouterr().out == "stopped with 0 of 1 steps done; the same command goes on\n"
    assert (tmp_path / "long/saved.txt").exists()

"""`--log_with`: the lines of `metrics.jsonl` go to a service for curves as well."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.report.tracker import Tracker

pytestmark = pytest.mark.slow
OWN = {"step", "phase", "time"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(folder):
    """(name, step, value) of everything in the folder's TensorBoard."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    names = found.Tags()["scalars"]
    return {(name, event.step, event.value) for name in names for event in found.Scalars(name)}


def expected(lines):
    return [
        (f"{line['phase']}/{name}", line["step"], float(value))
        for line in lines
        for name, value in line.items()
        if name not in OWN
    ]


def test_every_line_is_in_tensorboard_also_of_a_run_that_is_gone_on_with(
    tiny, toy_pool, no_conclusion, tmp_path
):
    folder = tmp_path / "run"
    assert tiny(folder, "--log_with=tensorboard", "--online.steps=3") == 0
    more = ["--resume=true", f"--output_dir={folder}", "--online.steps=6"]
    assert finetune_robomimic.main(more) == 0
    lines = lines_of(folder)
    assert {line["phase"] for line in lines} == {"pretrain", "offline", "online", "eval"}
    found, wanted = sorted(curves(folder)), sorted(set(expected(lines)))
    assert [each[:2] for each in found] == [each[:2] for each in wanted]
    np.testing.assert_allclose([v for *_, v in found], [v for *_, v in wanted], rtol=1e-5)


def test_a_resumed_run_may_leave_the_service_out(tiny, toy_pool, no_conclusion, tmp_path):
    folder = tmp_path / "run"
    assert tiny(folder, "--log_with=tensorboard", "--online.steps=3") == 0
    before = curves(folder)
    more = ["--resume=true", f"--output_dir={folder}", "--online.steps=6", "--log_with=null"]
    assert finetune_robomimic.main(more) == 0
    assert curves(folder) == before


def test_without_the_flag_nothing_is_written_and_nothing_else_differs(
    tiny, no_conclusion, tmp_path
):
    assert tiny(tmp_path / "run") == 0
    assert not (tmp_path / "run/tensorboard").exists()


@pytest.fixture
def trackio(monkeypatch):
    """Stands in for the package, which is not installed here."""
    calls = []

    def init(**arguments):
        calls.append(("init", arguments))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)),
            finish=lambda: calls.append(("finish",)),
        )

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    there = [*tracking.get_available_trackers(), SimpleNamespace(value="trackio")]
    monkeypatch.setattr(tracking, "_available_trackers", there)
    return calls


def test_a_service_gets_settings_without_paths_of_this_machine_and_one_growing_axis(
    tiny, no_conclusion, trackio, tmp_path
):
    assert tiny(tmp_path / "run", "--log_with=trackio") == 0
    (_, begun), *logged, last = trackio
    assert last == ("finish",)
    assert (begun["project"], begun["name"]) == ("vla_trqam", "run")
    assert str(tmp_path.parents[1]) not in json.dumps(begun["config"])
    assert begun["config"]["dataset"]["path"] == "<toy.hdf5>"
    lines = lines_of(tmp_path / "run")
    assert [step for _, step, _ in logged] == [*range(1, len(lines) + 1)]
    for (_, _, values), line in zip(logged, lines, strict=True):
        assert values[f"{line['phase']}/step"] == line["step"]
        assert {name.split("/")[1] for name in values} == line.keys() - OWN | {"step"}


def test_what_is_not_installed_or_unknown_is_one_sentence_and_leaves_no_folder(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for service, sentence in (
        ("wandb", "--log_with=wandb is not installed: `uv pip install wandb` brings it"),
        ("visdom", "log_with"),
    ):
        assert tiny(tmp_path / "run", f"--log_with={service}") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert sentence in said
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_service_that_does_not_start_is_one_sentence(
    tiny, trackio, tmp_path, capsys, monkeypatch
):
    def init(**_):
        raise ConnectionError("no such\nserver")

    monkeypatch.setattr(sys.modules["trackio"], "init", init)
    assert tiny(tmp_path / "run", "--log_with=trackio") == 2
    said = capsys.readouterr().err
    assert "error: --log_with=trackio does not start: ConnectionError: no such server\n" in said
    assert not (tmp_path / "run").exists()


def test_after_a_rollback_the_axis_goes_on():
    steps = []
    host = SimpleNamespace(log=lambda values, step: steps.append(step))
    tracker = Tracker(host, "wandb")
    for line in (7, 8, 8, 9):
        tracker.log(line, 0, "offline", {})
    assert steps == [7, 8, 9, 10]

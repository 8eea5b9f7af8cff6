"""The recipes for LeRobot's policies in two processes, as a launcher places them."""

import errno
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessException
from toy_deaths import dies_at_update, diverges_at_update, signalled_at_update
from toy_files import differences, metrics_lines
from toy_images import NUM_DEMOS, ImageToyPool
from two_runs import Two, two_run
from vla_runs import files, forgetful_pool, main, without_simulator

from vla_trqam.data.replay import Replay
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.launch import FULL_DISK
from vla_trqam.errors import UserError

__all__ = ["files", "forgetful_pool", "without_simulator"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def two(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return two_run(tmp_path_factory.mktemp("two") / "run", *files.flags())


def test_both_processes_end_with_the_same_weights_and_one_tells(two):
    assert [two.status(0), two.status(1)] == [0, 0]
    first, second = two.weights(0), two.weights(1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.abs().max() > 0 for name, value in first.items() if "lora_B" in name)
    assert two.said(1) == ""
    assert two.said(0).count("report ") == 1


def test_the_report_is_of_every_initial_state_in_order(two):
    evaluation = json.loads((two.folder / "evaluation.json").read_text())
    assert evaluation["seeds"] == [10000, 10001, 10002, 10003]
    assert (two.folder / "report.md").is_file()
    lines = metrics_lines(two.folder)
    assert len([line for line in lines if "episode_steps" in line]) == 2 + 2 * 2
    assert len([line for line in lines if "kl_estimate" in line]) == 3 + 4


def test_each_process_has_its_part_of_the_episodes(two):
    tasks, seen = [], []
    for name in ("replay", "replay_1"):
        replay = Replay.open(two.folder / name)
        episodes = replay.episodes()
        tasks.append([str(source) for source in episodes.source])
        seen.append(replay.observations[0].tobytes())
        replay.close()
    half = NUM_DEMOS // 2
    assert tasks == [["dataset"] * half + ["critic", "online", "online"]] * 2
    assert seen[0] != seen[1]


def diverging(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank == 1:
        diverges_at_update(patch, Cached, 3 + 3 * 5)  # the third online one


def test_what_diverges_on_one_process_rolls_both_back(files, tmp_path):
    flags = [*files.flags(), "--on_divergence=rollback"]
    rolled = two_run(tmp_path / "run", *flags, prepare=diverging)
    assert [rolled.status(0), rolled.status(1)] == [0, 0]
    first, second = rolled.weights(0), rolled.weights(1)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert rolled.said(0).count("with 0.5 of the step sizes") == 1
    assert rolled.said(1) == ""
    scalars = json.loads(rolled.state()["0 algorithm/scalars.json"])
    assert scalars["step_factor"] == 0.5
    steps = [line["step"] for line in metrics_lines(rolled.folder) if "kl_estimate" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def interrupted(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank == 1:
        signalled_at_update(patch, Cached, 5, signal.SIGINT)


def test_a_stop_of_one_process_stops_both_and_they_go_on_to_the_same_bits(two, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), prepare=interrupted)
    assert [found.status(0), found.status(1)] == [130, 130]
    assert f"torchrun --nproc_per_node=2 {sys.argv[0]}" in found.said(0)
    assert found.said(1) == ""
    assert (found.folder / "checkpoints/last").resolve().name == "000005"
    resumed = two_run(found.folder, "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [0, 0]
    assert differences(resumed.state(), two.state()) == []


def killed(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank == 1:
        dies_at_update(patch, Cached, 6)


def test_a_killed_process_costs_the_updates_since_the_checkpoint(two, files, tmp_path):
    with pytest.raises(ProcessException):
        two_run(tmp_path / "run", *files.flags(), prepare=killed)
    resumed = two_run(tmp_path / "run", "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [0, 0]
    assert differences(resumed.state(), two.state()) == []


def test_a_run_of_two_processes_is_not_gone_on_with_in_one(two, capsys):
    assert main("--resume=true", f"--output_dir={two.folder}") == 2
    assert "is of a run of 2 processes" in capsys.readouterr().err


def no_simulator(patch: pytest.MonkeyPatch, rank: int) -> None:
    def fail(*_: Any) -> None:
        raise UserError("no simulator here")

    if rank == 1:
        patch.setattr(engine, "_start_simulators", fail)


def test_what_fails_in_one_process_is_told_once_and_stops_both(two, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), prepare=no_simulator)
    assert [found.status(0), found.status(1)] == [2, 2]
    assert "error: process 1: no simulator here" in found.said(0)
    assert found.said(1) == ""
    check_goes_on(found.folder, two)


def check_goes_on(folder: Path, two: Two) -> None:
    """With what both had read, to the same bits."""
    resumed = two_run(folder, "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [0, 0]
    assert "with what had been read of its data" in resumed.said(0)
    assert not list(folder.glob("before_restart_*/replay*"))
    assert differences(resumed.state(), two.state()) == []


def full_disk(patch: pytest.MonkeyPatch, rank: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, FULL_DISK)

    if rank == 1:
        patch.setattr(Replay, "add", fail)


def test_a_disk_that_is_full_for_one_process_costs_no_reading_of_either(two, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), prepare=full_disk)
    assert [found.status(0), found.status(1)] == [2, 2]
    check_goes_on(found.folder, two)


def broken_simulator(patch: pytest.MonkeyPatch, rank: int) -> None:
    def breaks(call: int) -> None:
        raise UserError(f"the simulator broke at call {call}")

    if rank == 1:
        patch.setattr(ImageToyPool, "before_run", breaks)


def test_a_simulator_that_breaks_in_one_process_is_told_once(files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), prepare=broken_simulator)
    assert [found.status(0), found.status(1)] == [2, 2]
    assert "error: process 1: the simulator broke at call" in found.said(0)
    assert found.said(1) == ""


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--batch_size=1", "--batch_size is too small for 2 processes"),
        ("--micro_batches=4", "for each of the micro-batches"),
        ("--steps=-1", "--steps=-1 must not be negative"),
    ],
)
def test_settings_that_fit_no_two_processes_are_refused_once(flag, sentence, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), flag)
    assert [found.status(0), found.status(1)] == [2, 2]
    assert sentence in found.said(0)
    assert found.said(1) == ""

"""Exit status, threads, and what a launcher tells a process."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from vla_trqam.engine.launch import MAIN_ENDS_WITHIN, exit_status, usable_cores
from vla_trqam.engine.processes.team import (
    FailedElsewhereError,
)
from vla_trqam.errors import UserError
from vla_trqam.launched import launched_first, launched_here, launched_processes, launcher


@pytest.fixture
def second_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes here, and of four on two machines."""
    place = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)


def status(error: BaseException | None, folder: Path | None = None) -> int:
    def work(_: object) -> None:
        if error is not None:
            raise error

    config = SimpleNamespace(output_dir=folder, seed=0, num_threads=1)
    return exit_status(lambda: config, work)


def test_alone_there_is_one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    # As clusters have it before anything is launched.
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert (launched_processes(), launched_here(), launched_first()) == (1, 1, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launcher() == ["accelerate", "launch", "-q"]
    # Where accelerate would start a process on each.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launcher() == ["accelerate", "launch", "-q", "--num_processes=1"]


def test_the_command_to_go_on_with_keeps_the_launchers_precision(monkeypatch, second_of_four):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert launcher() == ["torchrun", "--nproc_per_node=4"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precise = ["env", "ACCELERATE_MIXED_PRECISION=bf16"]
    assert launcher() == [*precise, "torchrun", "--nproc_per_node=4"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    many = ["--multi_gpu", "--num_processes=4", "--mixed_precision=bf16"]
    assert launcher() == ["accelerate", "launch", "-q", *many]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launcher() == ["accelerate", "launch", "-q", "--mixed_precision=bf16"]


def test_a_launchers_processes_share_the_cores(second_of_four, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert (launched_processes(), launched_here(), launched_first()) == (4, 2, False)
    assert usable_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_sentence_that_says_how_to_go_on(error, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert status(error, tmp_path) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert f"--resume=true --output_dir={tmp_path}" in said
    assert said.count("\n") == 1


def test_other_failures_of_files_are_not_hidden():
    with pytest.raises(PermissionError):
        status(PermissionError(errno.EACCES, "Permission denied"))


def test_what_failed_elsewhere_is_told_there(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert status(FailedElsewhereError("no camera")) == 2
    assert waited == [MAIN_ENDS_WITHIN], "the main process was not let end first"
    assert status(None) == 0
    assert capsys.readouterr().err == ""


def test_settings_are_refused_by_the_first_process(second_of_four, capsys):
    def read() -> SimpleNamespace:
        raise UserError("--steps=-1 must not be negative")

    assert exit_status(read, lambda _: None) == 2
    assert capsys.readouterr().err == ""

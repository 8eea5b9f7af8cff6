"""Two processes reach what one reaches with the same rows and noise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import SCENARIOS, Place
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("distributed_worker.py")

Found = dict[str, Tensor]


def of_rank(folder: Path, name: str, rank: int) -> Found:
    return load_file(folder / f"{name}.{rank}.safetensors")


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes, started as a user starts them, left every scenario."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


def equal(first: Found, second: Found) -> list[str]:
    """Names whose values differ in a bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


METHODS = [name for name in SCENARIOS if name != "team_work"]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_reach_the_weights_lambda_and_metrics_of_one(two: Path, name: str) -> None:
    found, expected = of_rank(two, name, 0), SCENARIOS[name](Place())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_weights_lambda_its_average_and_metrics_are_equal_on_both_ranks(
    two: Path, name: str
) -> None:
    assert equal(of_rank(two, name, 0), of_rank(two, name, 1)) == []


def test_the_team_shares_work_gathers_it_and_tells_of_failures(two: Path) -> None:
    found, alone = of_rank(two, "team_work", 0), SCENARIOS["team_work"](Place())
    assert equal(found, of_rank(two, "team_work", 1)) == []
    assert found["order"].tolist() == alone["order"].tolist()
    assert found["names"].tolist() == [0, 11]
    for name in ("distinct", "first_is_as_alone", "told", "batch", "failure"):
        assert torch.equal(found[name], alone[name]), name
    assert bool(found["distinct"])
    assert bool(found["failure"])

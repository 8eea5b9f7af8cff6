"""A pushed policy acts, loaded by its repository's name, as the one in the run's folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_fixtures import SENDS_DEPRECATED, take_for_the_hub
from hub_server import HubServer
from pushed_run import write_run
from torch import Tensor
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings
from vla_trqam.adapters.tiny import checkpoints as tiny
from vla_trqam.recipes import hub as recipe

from vla_trqam.hub.pull import pull_checkpoint
from vla_trqam.hub.push import push_checkpoint

pytestmark = [pytest.mark.slow, SENDS_DEPRECATED]

FEATURES = tiny.flow_features(state_dim=5, action_dim=3)
BASE, WHOLE, ADAPTER, MERGED = "lab/base", "alice/whole", "alice/adapter", "alice/merged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[HubServer]:
    """The stand-in, as huggingface_hub takes it from its environment."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        take_for_the_hub(server, patch, folder)
        yield server
        huggingface_hub.close_session()


def push_base(hub: HubServer, folder: Path) -> None:
    checkpoint = tiny.write_checkpoint(
        tiny.tiny_pi0_config(FEATURES), tiny.unit_stats(FEATURES), folder / "base"
    )
    api = huggingface_hub.HfApi()
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=checkpoint)


@pytest.fixture(scope="module")
def tuned(hub: HubServer, folder: Path) -> LeRobotFlowPolicy:
    """A policy with adapters that were moved, against a base on the Hub."""
    push_base(hub, folder)
    policy = load_policy(BASE, lora=LoRASettings(r=2))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def run_of(policy: LeRobotFlowPolicy, folder: Path, *, merged: bool) -> Path:
    run = write_run(folder)
    saved = run / "checkpoints/last/pretrained_model"
    shutil.rmtree(saved)
    policy.save_pretrained(saved, merged=merged)
    return run


def velocities(policy: LeRobotFlowPolicy) -> tuple[Tensor, Tensor]:
    """Of the tuned and the base field, on one observation and noise."""
    generator = torch.Generator().manual_seed(3)
    assert policy.processors is not None
    observation = policy.processors.observe(
        {
            "observation.state": torch.randn(1, 5, generator=generator),
            "observation.images.top": torch.rand(1, 3, 32, 32, generator=generator),
            "task": ["lift the cube"],
        }
    )
    context = policy.encode(observation)
    x = torch.randn(1, *policy.chunk_shape, generator=generator)
    tau = torch.tensor([0.4])
    return policy.velocity(x, tau, context), policy.base_velocity(x, tau, context)


@pytest.fixture(scope="module")
def adapter_run(tuned: LeRobotFlowPolicy, folder: Path) -> Path:
    return run_of(tuned, folder / "adapter_run", merged=False)


def test_a_whole_policy_acts_the_same_from_the_hub(
    hub: HubServer, tuned: LeRobotFlowPolicy, folder: Path
):
    run = run_of(tuned, folder / "whole_run", merged=True)
    push_checkpoint(run, WHOLE)
    here = load_policy(run / "checkpoints/last/pretrained_model", lora=None)
    there = load_policy(WHOLE, lora=None)
    assert torch.equal(velocities(there)[0], velocities(here)[0])
    # W + BA is rounded once.
    torch.testing.assert_close(velocities(there)[0], velocities(tuned)[0], rtol=1e-4, atol=1e-5)


def test_adapters_go_on_from_the_hub_against_their_base_there(
    hub: HubServer, tuned: LeRobotFlowPolicy, adapter_run: Path, folder: Path
):
    push_checkpoint(adapter_run, ADAPTER)
    assert "model.safetensors" not in hub.repos[ADAPTER].files
    pulled = pull_checkpoint(ADAPTER, folder / "pulled")
    for source in (ADAPTER, pulled / "pretrained_model"):
        policy = load_policy(source, adapter="continue")
        for ours, theirs in zip(velocities(policy), velocities(tuned), strict=True):
            assert torch.equal(ours, theirs)


def full_disk(_: object, folder: Path, *, merged: bool) -> None:
    """It says whose disk is full: the run's, and no temporary one."""
    assert merged
    raise OSError(errno.ENOSPC, f"No space left: {folder.parent}")


def test_adapters_can_be_pushed_merged_into_a_whole_policy(
    hub: HubServer, tuned: LeRobotFlowPolicy, adapter_run: Path, monkeypatch, capsys
):
    flags = ["push", f"--run={adapter_run}", f"--repo_id={MERGED}", "--merged"]
    before = sorted(adapter_run.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(LeRobotFlowPolicy, "save_pretrained", full_disk)
        assert recipe.main(flags) == 2
        said = capsys.readouterr().err
        assert said.endswith(
            f"error: the merged policy cannot be written: [Errno 28] No space left: {adapter_run}\n"
        )
    assert recipe.main(flags) == 0
    assert sorted(adapter_run.iterdir()) == before
    assert not any("adapter" in path for path in hub.repos[MERGED].files)
    policy = load_policy(MERGED, lora=None)
    torch.testing.assert_close(velocities(policy)[0], velocities(tuned)[0], rtol=1e-4, atol=1e-5)

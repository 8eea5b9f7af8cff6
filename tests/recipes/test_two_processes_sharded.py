"""Two processes that each keep a part of what is trained (FSDP2): `--peft.shard=true`."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException
from toy_deaths import dies_at_update, signalled_at_update
from toy_files import differences
from two_runs import Two, two_run
from vla_runs import files, forgetful_pool, main, without_simulator

from vla_trqam.engine.cached import Cached
from vla_trqam.methods.parts.parallel import Ranks

__all__ = ["files", "forgetful_pool", "without_simulator"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]
FULL = ("--peft.method=full",)
SHARD = (*FULL, "--peft.shard=true")


def whole_of(found: Two, part: str) -> dict[str, torch.Tensor]:
    return load_file(found.folder / "checkpoints/last" / part)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs by more than what another order of sums makes of it."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.allclose(one[name], other[name], atol=2e-5)]


def weighing(folder: Path, patch: pytest.MonkeyPatch, rank: int) -> None:
    """Notes what share of the trained weights a process keeps."""
    make = Ranks.sharded

    def made(self, module, *arguments):
        make(self, module, *arguments)
        parts = [p for p in module.parameters() if isinstance(p, DTensor)]
        kept = sum(part.to_local().numel() for part in parts)
        (folder / f"share.{rank}").write_text(str(kept / sum(part.numel() for part in parts)))

    patch.setattr(Ranks, "sharded", made)


@pytest.fixture(scope="module")
def sharded(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    prepare = partial(weighing, folder)
    return two_run(folder / "run", *files.flags(), *SHARD, prepare=prepare)


def test_each_process_keeps_about_half(sharded):
    shares = [float((sharded.folder.parent / f"share.{rank}").read_text()) for rank in (0, 1)]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < 0.6


def test_parts_of_the_weights_train_to_what_whole_ones_do(sharded, files, tmp_path):
    whole = two_run(tmp_path / "run", *files.flags(), *FULL)
    assert [sharded.status(0), sharded.status(1)] == [0, 0]
    assert close(sharded.weights(0), whole.weights(0)) == []
    for part in ("algorithm/networks.safetensors", "training_state/optimizer_state.safetensors"):
        assert close(whole_of(sharded, part), whole_of(whole, part)) == []
    first, second = sharded.weights(0), sharded.weights(1)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert sharded.said(1) == ""
    # What is pushed is the whole policy, in LeRobot's format.
    names = "pretrained_model/model.safetensors"
    assert close(whole_of(sharded, names), whole_of(whole, names)) == []


def interrupted(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank == 1:
        signalled_at_update(patch, Cached, 5, signal.SIGINT)


def killed(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank == 1:
        dies_at_update(patch, Cached, 6)


def test_a_stop_of_one_process_stops_both_and_they_go_on_to_the_same_bits(sharded, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), *SHARD, prepare=interrupted)
    assert [found.status(0), found.status(1)] == [130, 130]
    resumed = two_run(found.folder, "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [0, 0]
    assert differences(resumed.state(), sharded.state()) == []


def test_a_killed_process_costs_the_updates_since_the_checkpoint(sharded, files, tmp_path):
    with pytest.raises(ProcessException):
        two_run(tmp_path / "run", *files.flags(), *SHARD, prepare=killed)
    resumed = two_run(tmp_path / "run", "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [0, 0]
    assert differences(resumed.state(), sharded.state()) == []


def test_next_actions_are_drawn_with_the_whole_weights(files, tmp_path):
    flags = ("--prefix_cache=none", "--critic.draw_next=false", "--critic.redraws=3")
    parts = two_run(tmp_path / "parts", *files.flags(), *flags, *SHARD)
    whole = two_run(tmp_path / "whole", *files.flags(), *flags, *FULL)
    assert [parts.status(0), parts.status(1)] == [0, 0]
    networks = "algorithm/networks.safetensors"
    assert close(whole_of(parts, networks), whole_of(whole, networks)) == []
    own = "training_state/rank_1/networks.safetensors"
    assert close(whole_of(parts, own), whole_of(whole, own)) == []


def test_a_damaged_checkpoint_is_told_once_and_nobody_waits(sharded, files, tmp_path):
    found = two_run(tmp_path / "run", *files.flags(), *SHARD, prepare=interrupted)
    weights = found.folder / "checkpoints/last/algorithm/networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = two_run(found.folder, "--resume=true")
    assert [resumed.status(0), resumed.status(1)] == [2, 2]
    assert "networks.safetensors" in resumed.said(0)
    assert resumed.said(1) == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (SHARD, "there is one process only; sharding"),
        (("--peft.method=lora", "--peft.shard=true"), "adapters are a thousandth of the model"),
        ((*SHARD, "--method.type=fql"), "fql trains no weights of the policy's"),
        ((*SHARD, "--method.type=qam_e"), "qam_e trains no weights of the policy's, or networks"),
        ((*SHARD, "--method.loss_steps=1"), "--peft.shard=true: loss_steps"),
        ((*SHARD, "--method.average_rate=0.1"), "--peft.shard=true: average_rate"),
    ],
)
def test_what_cannot_be_kept_in_parts_is_refused_before_anything_is_read(
    flags, said, tmp_path, capsys
):
    nowhere = ("--policy.path=nowhere", "--dataset.repo_id=local/none", "--dataset.root=nowhere")
    assert main(*nowhere, *flags, f"--output_dir={tmp_path / 'run'}") == 2
    assert said in capsys.readouterr().err


def test_a_run_in_parts_begins_with_the_critic_of_another(sharded, files, tmp_path):
    former = sharded.folder / "checkpoints/last"
    flags = (f"--critic.path={former}", "--critic.warmup_steps=0")
    found = two_run(tmp_path / "run", *files.flags(), *SHARD, *flags)
    assert [found.status(0), found.status(1)] == [0, 0], found.said(0)

"""Updates replayed from CUDA graphs: the numbers of before, in fewer launches."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from one_gpu import CUDA, accelerator
from safetensors.torch import load_file
from torch import Tensor
from toy_images import write_toy_dataset, write_toy_policy
from vla_costs.models import Setup, make_batch, make_observation, make_policy
from vla_trqam.adapters import lerobot_policy
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
KINDS = ("pi0", "pi05", "smolvla", "multi_task_dit")
STEPS, ROWS = 3, 4
REPLAYED = "--policy.cuda_graphs=true"


def policy_of(kind: str, *, full: bool = False) -> tuple[LeRobotFlowPolicy, Setup]:
    setup = Setup(kind, "tiny", "cpu", "float32", ROWS, 1, num_flow_steps=STEPS, lora_rank=4)
    policy = make_policy(setup)
    if full:
        policy = LeRobotFlowPolicy(policy.model.unload(), policy.family)
    return policy.to(CUDA), setup


def seen_by(policy: LeRobotFlowPolicy, setup: Setup, seed: int) -> dict[str, Tensor]:
    return {k: v.to(CUDA) for k, v in make_observation(policy, setup, seed).items()}


def updated(
    kind: str,
    config: TRQAMConfig,
    *,
    replayed: bool,
    full: bool = False,
    precision: str = "no",
    num_parts: int = 1,
) -> dict[str, Tensor]:
    """Weights and numbers after three updates, each of its own batch."""
    policy, setup = policy_of(kind, full=full)
    if replayed:
        policy.evaluations.record({ROWS})
    torch.manual_seed(0)
    length, _ = policy.chunk_shape
    chunk = length * int(policy.action_mask.sum())
    critic = Critic(CriticEnsemble(policy.feature_dim, chunk, (24, 24), 3)).to(CUDA)
    method = TRQAM(policy, critic, config, accelerator(precision))
    found: dict[str, Tensor] = {}
    for number in range(3):
        drawn = torch.Generator().manual_seed(number)
        action = torch.rand(ROWS, length, setup.action_dim, generator=drawn).to(CUDA) * 2 - 1
        batch = make_batch(
            policy, seen_by(policy, setup, number), seen_by(policy, setup, 9 + number), action
        )
        method.update(batch, torch.Generator(CUDA).manual_seed(number), num_parts=num_parts)
        found |= {f"{number}.{k}": torch.tensor(v) for k, v in method.metrics().items()}
    found |= {n: p.detach().cpu() for n, p in policy.named_parameters() if p.requires_grad}
    return found


def differences(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> list[str]:
    assert one.keys() == other.keys()
    return [n for n in one if not torch.allclose(one[n], other[n], rtol=tolerance, atol=tolerance)]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32, which would keep ten bits of a product's factors."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(lerobot_policy, "tensor_cores", nullcontext)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_updates_are_those_of_before(kind: str, full: bool) -> None:
    config = TRQAMConfig(actor_lr=1e-3)
    plain, found = (updated(kind, config, replayed=r, full=full) for r in (False, True))
    assert differences(found, plain, 1e-5) == []


@pytest.mark.parametrize(
    "config",
    [
        TRQAMConfig(actor_lr=1e-3, scheme="shifted_euler"),
        TRQAMConfig(actor_lr=1e-3, adjoint="scalar", loss_steps=2),
    ],
    ids=["shifted_euler", "scalar_on_some_steps"],
)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_every_chain_is_replayed_and_in_parts(config: TRQAMConfig, num_parts: int) -> None:
    plain, found = (
        updated("smolvla", config, replayed=r, full=True, num_parts=num_parts)
        for r in (False, True)
    )
    assert differences(found, plain, 1e-5) == []


def test_in_bfloat16_the_same_kernels_find_the_same() -> None:
    config = TRQAMConfig(actor_lr=1e-3)
    plain, found = (updated("pi0", config, replayed=r, precision="bf16") for r in (False, True))
    assert differences(found, plain, 1e-4) == []


def test_a_path_is_launched_as_a_few_graphs() -> None:
    """Kernels and graphs that the host launches in an update, which follow each other on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    counts = {}
    for replayed in (False, True):
        policy, setup = policy_of("pi0")
        if replayed:
            policy.evaluations.record({ROWS})
        with torch.no_grad():
            context = policy.encode(seen_by(policy, setup, 0))

        def path(policy: LeRobotFlowPolicy = policy, context: Any = context) -> None:
            fields = policy.path_fields(context, context)
            x = torch.zeros(ROWS, *policy.chunk_shape, device=CUDA)
            for step in range(STEPS):
                fields.evaluate(x, x, step / STEPS, step / STEPS)
            for step in range(STEPS):
                fields.base_pullback(step, x)
            fields.tuned().square().sum().backward()

        path()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            path()
        names = [event.name for event in profiler.events()]
        counts[replayed] = sum("Launch" in name for name in names)
    assert counts[True] < 0.25 * counts[False], counts


def test_sampling_is_replayed_at_as_many_observations_as_a_path_has() -> None:
    policy, setup = policy_of("pi0")
    with torch.no_grad():
        context = policy.encode(seen_by(policy, setup, 0))
    x, grid = torch.randn(ROWS, *policy.chunk_shape, device=CUDA), TimeGrid(STEPS)
    with torch.no_grad():
        plain = sample_ode(policy.sampled_field(context), x, grid)
        policy.evaluations.record({ROWS})
        assert policy.evaluations.replayed(context.condition, ROWS) is not None
        found = sample_ode(policy.sampled_field(context), x, grid)
        for weight in policy.trainable_parameters():  # in place, as an optimiser does it
            weight.add_(0.1)
        moved = sample_ode(policy.sampled_field(context), x, grid)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, plain, rtol=1e-5, atol=1e-5)


def test_a_run_ends_near_a_plain_one_and_twice_in_the_same_bits(tmp_path: Path) -> None:
    write_toy_policy(tmp_path / "policy")
    write_toy_dataset(tmp_path / "dataset", tmp_path / "scratch")
    run = [
        *("-m", "vla_trqam.recipes.finetune_pi0", f"--policy.path={tmp_path / 'policy'}"),
        *("--dataset.repo_id=local/toy", f"--dataset.root={tmp_path / 'dataset'}"),
        *("--env.type=null", "--online.steps=0", "--base_episodes=0", "--steps=6"),
        *("--critic.warmup_steps=4", "--batch_size=4", "--policy.tuned_flow_steps=2"),
    ]
    weights = {}
    for which, flags in {"plain": [], "replayed": [REPLAYED], "again": [REPLAYED]}.items():
        command = [sys.executable, *run, *flags, f"--output_dir={tmp_path / which}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        networks = tmp_path / which / "checkpoints/last/algorithm/networks.safetensors"
        weights[which] = load_file(networks)
    for name, value in weights["replayed"].items():
        assert torch.equal(weights["again"][name], value), name
        assert torch.allclose(weights["plain"][name], value, atol=1e-4), name

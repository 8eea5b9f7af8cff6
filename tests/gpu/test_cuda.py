"""What only a GPU shows: the same numbers as on the CPU, bfloat16, memory, a start by torchrun."""

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
from update_problems import ACTION, HORIZON, OBSERVATION, STEPS, batch_of, noise_of
from vla_costs.models import Setup, make_batch, make_observation, make_policy
from vla_trqam.adapters import lerobot_policy
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.divergence import not_finite
from vla_trqam.engine.folder.state import module_tensors
from vla_trqam.kernel_choice import Kernels, chosen_kernels
from vla_trqam.methods.base import OffPolicyMethod
from vla_trqam.methods.parts.adjoint_matching import UpdateNoise
from vla_trqam.methods.registry import METHODS, make_method
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SMALL: dict[str, dict[str, Any]] = {
    "fql": {"hidden_dims": (24,)},
    "dsrl": {"hidden_dims": (24,)},
    "qam_e": {"edit_hidden_dims": (24,)},
    "residual": {"edit_hidden_dims": (24,)},
    "sac_flow": {"hidden_dims": (24,), "gate_dim": 8},
}
# Given a reward by a file, which the contract of the methods makes.
NAMES = [name for name in METHODS if name != "reward_matching"]


def method_of(config: Any, device: torch.device) -> OffPolicyMethod:
    """The same weights on either device."""
    torch.manual_seed(0)
    shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS)
    policy = MLPFlowPolicy(shape)
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3))
    return make_method(policy.to(device), critic.to(device), config)


def noise_on(device: torch.device, number: int) -> UpdateNoise:
    return noise_to(noise_of(number), device)


def noise_to(noise: UpdateNoise, device: torch.device) -> UpdateNoise:
    names = ("next_action", "sde_x_0", "sde_steps", "bc_x_0", "bc_tau")
    return UpdateNoise(*(getattr(noise, name).to(device) for name in names))


def trained(device: torch.device, config: TRQAMConfig, updates: int = 5) -> dict[str, Tensor]:
    method = method_of(config, device)
    assert isinstance(method, TRQAM)
    for number in range(updates):
        method.update_with(batch_of(number).to(device), noise_on(device, number))
    return {name: value.cpu() for name, value in module_tensors(method).items()}


@pytest.fixture
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32, which would keep ten bits of a product's factors."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(lerobot_policy, "tensor_cores", nullcontext)


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize(
    "config",
    [
        TRQAMConfig(),
        TRQAMConfig(scheme="shifted_euler"),
        TRQAMConfig(adjoint="scalar"),
        TRQAMConfig(keep_activations=False),
    ],
    ids=["posterior", "shifted_euler", "scalar", "computed_again"],
)
def test_five_updates_end_in_the_weights_of_the_cpu(config: TRQAMConfig, kernels: Kernels) -> None:
    with chosen_kernels(kernels):
        expected, found = trained(torch.device("cpu"), config), trained(CUDA, config)
    start = module_tensors(method_of(config, torch.device("cpu")))
    moved = [name for name in expected if not torch.equal(expected[name], start[name].cpu())]
    assert any(name.startswith("policy.") for name in moved)
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), atol=5e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_every_method_goes_on_to_the_same_bits(name: str) -> None:
    def run() -> dict[str, Tensor]:
        method = method_of(METHODS[name].config(**SMALL.get(name, {})), CUDA)
        for number in range(4):
            generator = torch.Generator(CUDA).manual_seed(number)
            method.update(batch_of(number).to(CUDA), generator)
        return {key: value.clone() for key, value in module_tensors(method).items()}

    first, second = run(), run()
    assert {value.device.type for value in first.values()} == {"cuda"}
    for key, value in first.items():
        assert torch.isfinite(value.float()).all(), key
        assert torch.equal(value, second[key]), key


def vla_update(device: torch.device, precision: str) -> dict[str, float]:
    """The second update of adapters on a tiny π0, when its field has left the base."""
    setup = Setup("pi0", "tiny", "cpu", "float32", 4, 1, num_flow_steps=3, lora_rank=4)
    policy = make_policy(setup).to(device)
    observations = [make_observation(policy, setup, seed) for seed in (0, 1)]
    seen, following = ({k: v.to(device) for k, v in o.items()} for o in observations)
    length, _ = policy.chunk_shape
    drawn = torch.Generator().manual_seed(0)
    action = torch.rand(4, length, setup.action_dim, generator=drawn).to(device) * 2 - 1
    batch = make_batch(policy, seen, following, action)
    torch.manual_seed(0)
    chunk = length * int(policy.action_mask.sum())
    critic = Critic(CriticEnsemble(policy.feature_dim, chunk, (24, 24), 3)).to(device)
    method = TRQAM(policy, critic, TRQAMConfig(), accelerator(precision, device))
    found: dict[str, float] = {}
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        noise = UpdateNoise.draw(batch.action.cpu(), 3, generator)
        found = method.update_with(batch, noise_to(noise, device)).metrics()
    return found


SEEN = ("td_loss", "q_mean", "adjoint_norm_terminal", "adjoint_norm_initial", "adjoint_loss")


@pytest.mark.usefixtures("full_float32")
def test_adapters_of_a_vla_are_updated_as_on_the_cpu() -> None:
    expected, found = (vla_update(torch.device(kind), "no") for kind in ("cpu", "cuda"))
    for name in (*SEEN, "kl_estimate"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name


def test_a_vla_in_bfloat16_finds_about_what_float32_finds() -> None:
    exact, near = (vla_update(CUDA, precision) for precision in ("no", "bf16"))
    assert near["adjoint_norm_initial"] != exact["adjoint_norm_initial"]
    for name in SEEN:
        assert near[name] == pytest.approx(exact[name], rel=0.1), name


def test_numbers_are_looked_at_only_when_they_have_come_to_the_host() -> None:
    method = method_of(TRQAMConfig(), CUDA)
    for number in range(30):
        method.update(batch_of(number).to(CUDA), torch.Generator(CUDA).manual_seed(number))
        assert not_finite(method) is None
    next(method.policy.trainable_parameters()).data.view(-1)[3] = torch.nan
    assert "is not" not in str(not_finite(method))
    assert str(not_finite(method)).startswith("weight policy.")


def test_activations_computed_again_take_less_memory() -> None:
    def peak(*, keep: bool) -> int:
        torch.manual_seed(0)
        shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (512, 512, 512), num_flow_steps=10)
        critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3)).to(CUDA)
        with chosen_kernels("plain"):
            config = TRQAMConfig(keep_activations=keep)
            method = TRQAM(MLPFlowPolicy(shape).to(CUDA), critic, config)
            large = batch_of(0)
            for _ in range(8):
                large = TransitionBatch.concatenate(large, large)
            generator = torch.Generator(CUDA).manual_seed(0)
            large = large.to(CUDA)
            method.update(large, generator)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            method.update(large, generator)
        return torch.cuda.max_memory_allocated() - before

    assert peak(keep=False) < 0.6 * peak(keep=True)


def test_one_process_of_torchrun_ends_in_the_weights_of_a_plain_run(tmp_path: Path) -> None:
    """The process group of NCCL is made; one process has nothing to exchange by it."""
    write_toy_policy(tmp_path / "policy")
    write_toy_dataset(tmp_path / "dataset", tmp_path / "scratch")
    run = [
        *("-m", "vla_trqam.recipes.finetune_pi0", f"--policy.path={tmp_path / 'policy'}"),
        *("--dataset.repo_id=local/toy", f"--dataset.root={tmp_path / 'dataset'}"),
        *("--env.type=null", "--online.steps=0", "--base_episodes=0", "--steps=4"),
        *("--critic.warmup_steps=4", "--batch_size=4", "--policy.tuned_flow_steps=2"),
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    weights = {}
    for which, starter in {"plain": [], "ranks": launch}.items():
        output = tmp_path / which
        command = [sys.executable, *starter, *run, f"--output_dir={output}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        weights[which] = load_file(output / "checkpoints/last/algorithm/networks.safetensors")
    assert weights["plain"]
    for name, value in weights["plain"].items():
        assert torch.equal(weights["ranks"][name], value), name

"""Adjoint matching with a given reward: the tilted Gaussian, and critics of earlier runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import chain_mean, gaussian, moves_of, ode_end, optimal_offsets
from flow_problems import FunctionPolicy, gaussian_field, gaussian_gain
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from update_problems import ACTION, BATCH, HORIZON, OBSERVATION, batch_of, method_of
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.folder.state import module_tensors
from vla_trqam.errors import UserError
from vla_trqam.methods.reward_matching import (
    CriticReward,
    RewardMatching,
    RewardMatchingConfig,
    read_reward,
)
from vla_trqam.methods.trqam import SchemeName
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

STEPS, VARIANCE, LAM = 10, 0.5, 1.5
W = (1.0, -0.5)


class Offsets(nn.Module):
    """The base's field and a free offset at every step: the optimum lies in this family."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(STEPS, len(W)))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        i = round(float(tau[0]) * STEPS)
        return gaussian_gain(i / STEPS, VARIANCE) * x + self.offset[i]


class Unlimited(FunctionPolicy):
    """A robot that executes any number."""

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)

    def features(self, context: Any) -> Tensor:
        return context


def transitions(rows: int) -> TransitionBatch:
    state, ones = torch.zeros(rows, 1), torch.ones(rows)
    return TransitionBatch(
        observation=state,
        action=torch.full((rows, 1, len(W)), torch.nan),  # is not read
        chunk_return=torch.full((rows,), torch.nan),  # nor this
        next_observation=state,
        discount=ones,
        terminated=ones.bool(),
        truncated=~ones.bool(),
        valid=torch.ones(rows, 1, dtype=torch.bool),
    )


def linear(features: Tensor, executed: Tensor) -> Tensor:
    """``w . x``."""
    return (executed.flatten(1) * torch.tensor(W)).sum(dim=1)


def trained(scheme: SchemeName, **knobs: Any) -> tuple[RewardMatching, Offsets]:
    torch.manual_seed(0)
    tuned = Offsets()
    policy = Unlimited(tuned, gaussian_field(VARIANCE), (1, len(W)), STEPS)
    critic = Critic(CriticEnsemble(1, len(W), (4,), 1))
    config = RewardMatchingConfig(scheme=scheme, max_grad_norm=1e3, actor_lr=0.02, **knobs)
    method = RewardMatching(policy, critic, config, reward=linear)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        method.update(transitions(4), generator)
    return method, tuned


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])
def test_a_linear_reward_shifts_a_gaussian_by_its_variance_times_the_slope_over_lambda(
    scheme: SchemeName, scale: float
) -> None:
    """N(0, s^2), r = w x: this K's own optimum, and nearly N(s^2 scale w / lam, s^2)."""
    lam = LAM * scale
    method, tuned = trained(scheme, dual_step_size=0.0, lam_init=lam, reward_scale=scale)
    moves, gain = moves_of(method.config.chain, STEPS), gaussian(VARIANCE)
    offsets = optimal_offsets(moves, gain, LAM)
    for dim, w in enumerate(W):
        found = tuned.offset[:, dim].detach().numpy()
        assert found == pytest.approx(w * offsets, abs=5e-3)
        mean = chain_mean(moves, gain, found)
        assert mean == pytest.approx(w * chain_mean(moves, gain, offsets), abs=5e-3)
        assert mean == pytest.approx(w * VARIANCE / LAM, rel=0.4)
    acted = sample_ode(
        lambda x, tau: method.policy.velocity(x, tau, None), torch.zeros(1, 1, 2), TimeGrid(STEPS)
    )
    expected = ode_end(STEPS, gain, 0.0, offsets)
    assert acted.flatten().tolist() == pytest.approx([w * expected for w in W], abs=1e-2)
    assert method.metrics()["lam"] == lam


def test_the_trust_region_is_trqams() -> None:
    """Lambda moves until the KL is at its budget."""
    method, _ = trained(
        "posterior", kl_budget=0.05, kl_per_action=False, lam_init=1.0, dual_step_size=0.5
    )
    assert method.metrics()["kl_estimate"] == pytest.approx(0.05, rel=0.2)
    assert method.trust_region.lam > 1.0


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A checkpoint's folder of an earlier run, its critic's target apart from the online one."""
    method = method_of()
    with torch.no_grad():
        for parameter in method.critic.target.parameters():
            parameter.add_(0.1)
    (tmp_path / "algorithm").mkdir()
    save_file(module_tensors(method), tmp_path / "algorithm/networks.safetensors")
    return tmp_path


def policy_of(horizon: int = HORIZON) -> MLPFlowPolicy:
    torch.manual_seed(0)
    return MLPFlowPolicy(MLPFlowConfig(OBSERVATION, ACTION, horizon, (24, 24), num_flow_steps=4))


def critic_of() -> Critic:
    return Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (8,), 2))


def test_the_reward_of_a_checkpoint_is_the_mean_of_its_critics_target(earlier: Path) -> None:
    method = RewardMatching(policy_of(), critic_of(), RewardMatchingConfig(reward_path=earlier))
    features, action = torch.randn(7, OBSERVATION), torch.rand(7, HORIZON, ACTION)
    tensors = load_file(earlier / "algorithm/networks.safetensors")
    truth = CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3)
    prefix = "critic.target."
    truth.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if prefix in k})
    expected = truth(features, action).mean(dim=0)
    torch.testing.assert_close(method.score(features, action), expected.detach())
    before = {k: v.clone() for k, v in method.modules()["reward"].state_dict().items()}
    for number in range(5):
        method.update(batch_of(number), torch.Generator().manual_seed(number))
    after = method.modules()["reward"].state_dict()
    assert all(torch.equal(after[k], value) for k, value in before.items())
    assert method.next_action is None
    logged = method.metrics()
    assert not {"td_loss", "q_mean", "critic_grad_norm"} & logged.keys()
    assert {"reward_mean", "kl_estimate", "lam"} <= logged.keys()


def test_the_reward_rises(earlier: Path) -> None:
    config = RewardMatchingConfig(reward_path=earlier, lam_init=0.1, dual_step_size=0.0)
    method, rewards = RewardMatching(policy_of(), critic_of(), config), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        method.update(batch_of(), generator)
        rewards.append(method.metrics()["reward_mean"])
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.2


def without(path: Path, prefix: str) -> None:
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith(prefix)}
    save_file(tensors, path)


def refusal(folder: Path | None) -> str:
    with pytest.raises(UserError) as error:
        RewardMatchingConfig(reward_path=folder).check_inputs()
    return str(error.value)


def test_a_missing_or_broken_reward_is_refused_with_its_place(earlier: Path) -> None:
    file = earlier / "algorithm/networks.safetensors"
    assert refusal(None).startswith("--method.type=reward_matching needs --method.reward_path")
    assert "has no algorithm/networks.safetensors: it must be" in refusal(earlier / "algorithm")
    tensors = load_file(file)
    bad = {k: torch.full_like(v, torch.nan) for k, v in tensors.items()}
    save_file(bad, file)
    assert refusal(earlier) == f"{file}: its critic has a number that is not finite"
    save_file({k: v for k, v in tensors.items() if "target.layers.1.bias" not in k}, file)
    assert f"{file} holds a critic of another kind" in refusal(earlier)
    without(file, "critic.")
    assert refusal(earlier) == f"{file} holds no critic: the run of that checkpoint learnt none"
    file.write_bytes(b"\x05" + bytes(7) + b"notjson" * 9)
    assert "cannot be read" in refusal(earlier)


def test_a_critic_of_other_sizes_is_refused(earlier: Path) -> None:
    config = RewardMatchingConfig(reward_path=earlier)
    with pytest.raises(
        UserError, match=r"its critic sees 11 numbers, and this run's policy has 17"
    ):
        RewardMatching(policy_of(horizon=4), critic_of(), config)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("hidden", [(8,), (12, 6, 10)])
def test_a_critics_shape_is_that_of_its_weights(
    hidden: tuple[int, ...], layer_norm: bool, tmp_path: Path
) -> None:
    ensemble = CriticEnsemble(4, 3, hidden, 5, layer_norm=layer_norm)
    (tmp_path / "algorithm").mkdir()
    tensors = {f"critic.target.{k}": v for k, v in ensemble.state_dict().items()}
    save_file(tensors, tmp_path / "algorithm/networks.safetensors")
    reward = read_reward(tmp_path)
    assert isinstance(reward, CriticReward)
    assert reward.ensemble.hidden_dims == hidden
    assert not any(p.requires_grad for p in reward.parameters())
    features, action = torch.randn(6, 4), torch.randn(6, 1, 3)
    expected = ensemble(features, action).mean(dim=0)
    torch.testing.assert_close(reward(features, action), expected)


def test_a_reward_that_cannot_be_ascended_is_refused() -> None:
    def of_the_state(features: Tensor, executed: Tensor) -> Tensor:
        return features.sum(dim=1)

    def one_number(features: Tensor, executed: Tensor) -> Tensor:
        return executed.mean()

    for reward, said in (
        (of_the_state, rf"shape \({BATCH},\) and no gradient to them; it must be \({BATCH},\)"),
        (one_number, rf"has shape \(\); it must be \({BATCH},\)"),
    ):
        method = RewardMatching(policy_of(), critic_of(), RewardMatchingConfig(), reward=reward)
        with pytest.raises(UserError, match=said):
            method.update(batch_of(), torch.Generator())


def test_there_is_no_critic_to_update_and_a_scale_is_positive() -> None:
    method = RewardMatching(policy_of(), critic_of(), RewardMatchingConfig(), reward=linear)
    with pytest.raises(ValueError, match="learns no critic"):
        method.update_critic(batch_of(), torch.Generator())
    assert method.critic_metrics() == {}
    with pytest.raises(UserError, match=r"reward_scale is 0\.0; it must be positive"):
        RewardMatchingConfig(reward_scale=0.0)

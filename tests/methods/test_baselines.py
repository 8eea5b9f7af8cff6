"""The methods beside the flow, against independent truths, and on a task that each must solve."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bandit import BATCH, SHAPE, SOLVED, pretrained, reward, transitions
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.methods.base import GeneratorNoise, MethodConfig
from vla_trqam.methods.best_of_n import BestOfNConfig, BestOfNMethod
from vla_trqam.methods.cgql import CGQLConfig, CGQLLConfig
from vla_trqam.methods.dsrl import DSRL, DSRLConfig
from vla_trqam.methods.external_kl import ExternalKLConfig
from vla_trqam.methods.fql import FQLConfig
from vla_trqam.methods.ifql import IFQL, VALUE, BestOfN, IFQLConfig
from vla_trqam.methods.qam_e import QAMEConfig
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.residual import ResidualConfig
from vla_trqam.methods.sac_flow import SACFlowConfig
from vla_trqam.methods.sqam import SQAMConfig
from vla_trqam.networks import TanhGaussian

RATES = {"actor_lr": 1e-3, "critic_lr": 3e-3}
CONFIGS: dict[str, MethodConfig] = {
    "fql": FQLConfig(alpha=0.1, hidden_dims=(48, 48), **RATES),
    "ifql": IFQLConfig(num_samples=64, **RATES),
    # A box of noise wide enough for the flow to reach the best action.
    "dsrl": DSRLConfig(
        noise_scale=2.5, target_entropy=-6.0, hidden_dims=(48, 48), actor_lr=1e-2, critic_lr=3e-3
    ),
    "residual": ResidualConfig(
        edit_scale=1.0,
        target_entropy=-4.0,
        edit_hidden_dims=(48, 48),
        actor_lr=1e-2,
        critic_lr=3e-3,
    ),
    "sqam": SQAMConfig(inverse_temperature=10.0, **RATES),
    "qam_e": QAMEConfig(
        inverse_temperature=10.0,
        edit_scale=0.2,
        target_entropy=-6.0,
        edit_hidden_dims=(48, 48),
        **RATES,
    ),
    # Its temperature is never below 1: the rewards must be large instead.
    "external_kl": ExternalKLConfig(kl_budget=3.0, lam_init=1.0, **RATES),
    "best_of_n": BestOfNConfig(num_samples=64, **RATES),
    "cgql": CGQLConfig(inverse_temperature=10.0, **RATES),
    "cgql_l": CGQLLConfig(inverse_temperature=40.0, noisy_weight=0.02, **RATES),
    "sac_flow": SACFlowConfig(
        **{"hidden_dims": (48, 48), "gate_dim": 16, "actor_lr": 3e-3, "critic_lr": 3e-3},
        **{"bc_weight": 0.1, "cloning_weight": 0.05},
    ),
}
ENOUGH = {"cgql_l": -0.6}
"""Where the best is out of reach: guidance tilts by theta beta, and a beta much above 40 makes the
exponent of LINEX outrun the critic."""


SCALES = {"external_kl": 10.0}
SLOWER = {"fql": 400, "dsrl": 500, "residual": 400, "cgql_l": 500}
UPDATES = dict.fromkeys(CONFIGS, 250) | SLOWER


def train(config: MethodConfig, updates: int, value: Callable[[Tensor], Tensor]) -> float:
    """Mean reward of what acts after so many updates on returns of this value."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 2), target_rate=0.02)
    method, generator = make_method(policy, critic, config), torch.Generator().manual_seed(2)
    for _ in range(updates):
        batch = transitions(generator)
        batch.chunk_return.copy_(value(batch.action))
        method.update(batch, generator)
    noise = GeneratorNoise(torch.Generator().manual_seed(9), 1000, torch.device("cpu"))
    action = method.actor().chunk(policy.encode(torch.zeros(1000, 1)), noise)
    return float(reward(action.clamp(-1, 1)).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_each_solves_a_bandit(name: str) -> None:
    scale = SCALES.get(name, 1.0)
    found = train(CONFIGS[name], UPDATES[name], lambda action: scale * reward(action))
    assert found > ENOUGH.get(name, SOLVED)


# The others' sign is TRQAM's, of tests/core/test_bandit.py.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("sqam", "external_kl")])
def test_the_same_run_with_the_rewards_negated_does_worse_than_the_base(name: str) -> None:
    base = train(IFQLConfig(num_samples=1), 1, reward)
    assert train(CONFIGS[name], 75, lambda action: -reward(action)) < base < -1.0


def noise_of(seed: int) -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(seed), BATCH, torch.device("cpu"))


def test_a_critic_that_fql_learns_before_its_one_step_network_values_the_flow() -> None:
    """As that of the methods whose flow acts: not what a network does that knows nothing."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 2))
    method = make_method(policy, critic, CONFIGS["fql"])
    batch = transitions(torch.Generator().manual_seed(3))
    going_on = torch.zeros_like(batch.terminated)
    batch = replace(batch, terminated=going_on, discount=torch.ones_like(batch.discount))
    ranges = []
    for actor in (method.first_actor(), method.actor()):
        # Of many draws: the update's noise is its own.
        with torch.no_grad():
            context = policy.encode(batch.next_observation)
            values = [
                method.critic.next_value(
                    policy.features(context),
                    policy.executed(actor.chunk(context, noise)),
                )
                for noise in map(noise_of, range(20))
            ]
        ranges.append([float((batch.chunk_return + value).mean()) for value in values])
    method.update_critic(batch, torch.Generator().manual_seed(2))
    found = method.critic_metrics()["target_mean"]
    flow, one_step = ranges
    assert min(flow) <= found <= max(flow)
    assert not min(one_step) <= found <= max(one_step)


def test_fql_with_a_large_alpha_is_the_flow_in_one_step() -> None:
    """Held to the distillation, mu(s, z) is what the flow makes of the same z."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 2))
    config = FQLConfig(alpha=1e4, hidden_dims=(48, 48), **RATES)
    method, generator = make_method(policy, critic, config), torch.Generator().manual_seed(2)
    for _ in range(800):
        method.update(transitions(generator), generator)
    context = policy.encode(torch.zeros(500, 1))

    def acts(which: Any) -> Tensor:
        noise = GeneratorNoise(torch.Generator().manual_seed(5), 500, torch.device("cpu"))
        return method.actor(which).chunk(context, noise).clamp(-1, 1)

    assert (acts("tuned") - acts("base")).square().mean().sqrt() < 0.08


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_ifqls_value_is_the_expectile_of_the_critic(kappa: float) -> None:
    """At one state V meets ``sum w (q - V) = 0``, found here by bisection."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 2), target_rate=0.0)
    method = IFQL(policy, critic, IFQLConfig(kappa=kappa, critic_lr=1e-2))
    batch = transitions(torch.Generator().manual_seed(2))
    for _ in range(300):
        method.update(batch, torch.Generator())
    q = critic.next_value(policy.encode(batch.observation), batch.action)
    low, high = float(q.min()), float(q.max())
    for _ in range(60):
        middle = (low + high) / 2
        weight = torch.where(q >= middle, kappa, 1 - kappa)
        low, high = (middle, high) if float((weight * (q - middle)).sum()) > 0 else (low, middle)
    value = float(method.own[VALUE](policy.encode(batch.observation[:1])).detach())
    assert value == pytest.approx(low, abs=0.01)
    assert (value > float(q.mean())) == (kappa > 0.5) or kappa == 0.5


def test_the_value_of_best_of_n_is_the_expectile_of_the_least_target_head_at_whole_chunks() -> None:
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 3), target_rate=0.0)
    method = BestOfNMethod(policy, critic, BestOfNConfig(kappa=0.8, critic_lr=1e-2))
    batch = transitions(torch.Generator().manual_seed(2))
    batch.terminated[:], batch.valid[::2] = False, False
    # Were the first half counted, V would be far away.
    batch.action[::2] = 1.0
    for _ in range(300):
        method.update(batch, torch.Generator())
    context = policy.encode(batch.observation)
    q = critic.target(context, batch.action).min(dim=0).values[1::2]
    value = float(method.own[VALUE](context[:1]).detach())
    weight = torch.where(q >= value, 0.8, 0.2)
    assert float((weight * (q - value)).sum() / weight.sum()) == pytest.approx(0.0, abs=0.01)


def test_best_of_n_asks_the_target_heads_and_of_one_chunk_is_the_base() -> None:
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 3))
    context = policy.encode(torch.zeros(50, 1))

    def acts(num_samples: int, which: Any = "tuned") -> Tensor:
        method = BestOfNMethod(policy, critic, BestOfNConfig(num_samples=num_samples))
        noise = GeneratorNoise(torch.Generator().manual_seed(5), 50, torch.device("cpu"))
        return method.actor(which).chunk(context, noise)

    chosen = acts(8)
    assert torch.equal(acts(1), acts(1, "base"))
    assert not torch.equal(chosen, acts(1))
    with torch.no_grad():
        for parameter in critic.online.parameters():
            parameter.normal_()
    assert torch.equal(acts(8), chosen)
    with torch.no_grad():
        for parameter in critic.target.parameters():
            parameter.normal_()
    assert not torch.equal(acts(8), chosen)


def test_the_best_of_n_is_the_chunk_whose_worst_value_is_the_best() -> None:
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = CriticEnsemble(1, 2, (48, 48), 3)
    context = policy.encode(torch.randn(6, 1))
    proposals = torch.randn(4, 6, 1, 2, generator=torch.Generator().manual_seed(0))

    class Given:
        def __init__(self) -> None:
            self.left = iter(proposals)

        def chunk(self, context: Any, noise: Any) -> Tensor:
            return next(self.left)

    noise = GeneratorNoise(torch.Generator(), 6, torch.device("cpu"))
    found = BestOfN(policy, Given(), critic, 4).chunk(context, noise)
    with torch.no_grad():
        values = [critic(context, p.clamp(-1, 1)).min(dim=0).values for p in proposals]
    for row in range(6):
        best = max(range(4), key=lambda n, row=row: float(values[n][row]))
        assert torch.equal(found[row], proposals[best, row])


def test_a_squashed_gaussians_density_is_torchs() -> None:
    torch.manual_seed(0)
    network = TanhGaussian(3, 2, (8,))
    inputs, noise = torch.randn(5, 3), torch.randn(5, 2)
    z, log_p = network(inputs, noise)
    h = network.trunk.hidden(inputs)
    mean, std = network.trunk.layers[-1](h), network.log_std(h).exp()
    normal = torch.distributions.Normal(mean, std)
    law = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform(cache_size=1)
    )
    assert torch.allclose(z, torch.tanh(mean + std * noise))
    assert torch.allclose(log_p, law.log_prob(z).sum(dim=1), atol=1e-3)
    far, _ = network(1e4 * inputs, noise)
    assert bool(torch.isfinite(far).all())


def test_dsrls_temperature_falls_while_the_entropy_is_above_its_target() -> None:
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)

    def temperature_after(target: float) -> float:
        critic = Critic(CriticEnsemble(1, 2, (48, 48), 2))
        method = DSRL(policy, critic, DSRLConfig(target_entropy=target, hidden_dims=(16,)))
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            method.update(transitions(generator), generator)
        return method.metrics()["temperature"]

    assert temperature_after(-50.0) < 1.0 < temperature_after(50.0)

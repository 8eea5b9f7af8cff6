"""TRQAM must solve something: one step, one reward, two numbers to choose."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble, Executed, in_box
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.losses import flow_matching_loss, flow_matching_target
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

BATCH, STEPS, UPDATES = 128, 5, 300
SHAPE = MLPFlowConfig(1, 2, 1, (48, 48), num_flow_steps=STEPS)
BEST, BASE_MEAN, BASE_SPREAD = 0.5, -0.2, 0.4
# The base earns -1.15 on average and the best action 0; trained, the policy earns -0.04.
SOLVED = -0.2


def reward(action: Tensor) -> Tensor:
    return -(action - BEST).square().flatten(1).sum(1)


class FlippedCritic(Critic):
    """Points downhill: what a wrong sign of the adjoint would do."""

    def action_gradient(
        self,
        features: Tensor,
        action: Tensor,
        executed: Executed = in_box,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        gradient, value = super().action_gradient(features, action, executed, noise)
        return -gradient, value


def behaviour(generator: torch.Generator) -> Tensor:
    noise = torch.randn(BATCH, 1, 2, generator=generator)
    return (BASE_MEAN + BASE_SPREAD * noise).clamp(-1, 1)


@cache
def pretrained() -> dict[str, Tensor]:
    """A base that imitates the behaviour."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    policy, observation = MLPFlowPolicy(SHAPE), torch.zeros(BATCH, 1)
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=3e-3)
    for _ in range(300):
        x_0, tau = torch.randn(BATCH, 1, 2, generator=generator), torch.rand(BATCH)
        x_tau, target = flow_matching_target(behaviour(generator), x_0, tau)
        predicted = policy.velocity(x_tau, tau, observation)
        loss = flow_matching_loss(predicted, target, torch.ones(BATCH, 1, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.reset_base()
    return policy.state_dict()


def transitions(generator: torch.Generator) -> TransitionBatch:
    action, state = behaviour(generator), torch.zeros(BATCH, 1)
    return TransitionBatch(
        observation=state,
        action=action,
        chunk_return=reward(action),
        next_observation=state,
        discount=torch.full((BATCH,), 0.99),
        terminated=torch.ones(BATCH, dtype=torch.bool),
        truncated=torch.zeros(BATCH, dtype=torch.bool),
        valid=torch.ones(BATCH, 1, dtype=torch.bool),
    )


def mean_reward(policy: MLPFlowPolicy) -> float:
    noise = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(9))
    context = policy.encode(torch.zeros(2000, 1))
    with torch.no_grad():
        action = sample_ode(lambda x, tau: policy.velocity(x, tau, context), noise, TimeGrid(STEPS))
    return float(reward(action.clamp(-1, 1)).mean())


def train(
    critic_type: type[Critic], kl_budget: float, **settings: Any
) -> tuple[float, float, TRQAM]:
    """Mean reward before and after, and the method."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    before = mean_reward(policy)
    torch.manual_seed(1)
    critic = critic_type(CriticEnsemble(1, 2, (48, 48), 2), target_rate=0.02)
    rates = {"dual_step_size": 0.05, "actor_lr": 1e-3, "critic_lr": 3e-3}
    config = TRQAMConfig(kl_budget=kl_budget, lam_init=1.0, **rates | settings)
    method, generator = TRQAM(policy, critic, config), torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        batch = transitions(generator)
        method.update_with(batch, UpdateNoise.draw(batch.action, STEPS, generator))
    return before, mean_reward(policy), method


CHAINS = [
    {"scheme": "posterior"},
    {"scheme": "shifted_euler"},
    {"scheme": "posterior", "adjoint": "scalar"},
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_trqam_solves_a_bandit(chain: dict[str, Any]) -> None:
    before, after, _ = train(Critic, kl_budget=3.0, **chain)
    assert before < -1.0 < SOLVED
    assert after > SOLVED


@pytest.mark.parametrize("chain", CHAINS[:2], ids=str)
def test_the_same_run_with_the_adjoints_sign_flipped_fails(chain: dict[str, Any]) -> None:
    before, after, _ = train(FlippedCritic, kl_budget=3.0, **chain)
    assert after < before


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_tight_budget_keeps_the_policy_near_its_base(chain: dict[str, Any]) -> None:
    before, after, method = train(Critic, kl_budget=0.05, **chain)
    assert before < after < SOLVED
    assert method.trust_region.lam > method.config.lam_init

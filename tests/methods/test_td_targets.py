"""What the next state is worth, and which draws are whose: residual RL and SAC Flow by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bandit import BATCH, SHAPE, STEPS, pretrained, transitions
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.base import GeneratorNoise, MethodConfig
from vla_trqam.methods.parts.edit import EDIT
from vla_trqam.methods.parts.off_policy import OffPolicyMethod
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.residual import ResidualConfig
from vla_trqam.methods.sac_flow import SACFlowConfig

EDITED = ResidualConfig(edit_scale=0.4, edit_hidden_dims=(16,))


@torch.enable_grad()
def made(config: MethodConfig) -> Any:
    """A method after an update, so that nothing of it is as it began."""
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(3)
    method = make_method(policy, Critic(CriticEnsemble(1, 2, (16,), 2), pessimism=0.5), config)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        method.update(transitions(generator), generator)
    return method


def batch_of(seed: int) -> TransitionBatch:
    """Chunks that go on, to states other than where they began."""
    generator = torch.Generator().manual_seed(seed)
    return replace(
        transitions(generator),
        next_observation=torch.randn(BATCH, 1, generator=generator),
        terminated=torch.zeros(BATCH, dtype=torch.bool),
    )


def loss_of(method: OffPolicyMethod, batch: TransitionBatch, value: Tensor) -> Tensor:
    """Of the critic, where the next states are worth this: the mean of all squared errors."""
    target = batch.chunk_return + batch.discount * value
    q = method.critic.online(batch.observation, batch.action[:, :, :2])
    return (q - target).square().mean()


def flowed(method: Any, field: Any, states: Tensor, noise: Tensor) -> Tensor:
    """Euler's steps, one by one."""
    context, x = method.policy.encode(states), noise
    for i in range(STEPS):
        x = x + field(x, torch.full((len(x),), i / STEPS), context) / STEPS
    return x


def edited(method: Any, states: Tensor, chunk: Tensor, noise: Tensor) -> Tensor:
    """The flow's chunk within the limits, and a bounded step from there, within them again."""
    flow = chunk.clamp(-1.0, 1.0)
    step, _ = method.own[EDIT](torch.cat([states, flow.flatten(1)], dim=1), noise.flatten(1))
    return (flow + EDITED.edit_scale * step.view_as(flow)).clamp(-1.0, 1.0)


@torch.no_grad()
def test_residuals_target_is_of_the_edited_chunk_of_the_base_at_the_next_state() -> None:
    method, batch = made(EDITED), batch_of(5)
    draws = method.draw(batch, torch.Generator().manual_seed(6))
    base, states = method.policy.base_velocity, batch.next_observation
    chunk = flowed(method, base, states, draws["next"])
    expected = edited(method, states, chunk, draws["next_edit"])
    found = method.critic_losses(batch, draws)
    torch.testing.assert_close(found.next_action, expected, rtol=1e-5, atol=1e-6)
    assert (expected - chunk.clamp(-1.0, 1.0)).abs().max() > 0.01
    value = method.critic.next_value(states, expected)
    torch.testing.assert_close(found.loss, loss_of(method, batch, value), rtol=1e-5, atol=1e-6)


def test_residuals_edit_learns_at_chunks_of_noise_of_their_own() -> None:
    """Not of the target's, with which they would lie at the same noise."""
    method, batch = made(EDITED), batch_of(5)
    draws = method.draw(batch, torch.Generator().manual_seed(6))
    given = replace(batch, next_action=batch.action.clamp(-1.0, 1.0))
    loss = float(method.losses(given, draws).loss)
    for name, changes in (("next", False), ("next_edit", False), ("flow", True), ("edit", True)):
        other = draws | {name: torch.zeros_like(draws[name])}
        assert (float(method.losses(given, other).loss) != loss) == changes, name


@torch.no_grad()
def test_residual_edits_a_training_base_as_it_is_and_not_its_mean() -> None:
    method, batch = made(replace(EDITED, train_base=True, actor_lr=1e-2)), batch_of(5)
    draws = method.draw(batch, torch.Generator().manual_seed(6))
    states, online = batch.next_observation, method.policy.behaviour_velocity
    chunk = flowed(method, online, states, draws["next"])
    mean = flowed(method, method.policy.base_velocity, states, draws["next"])
    assert (chunk - mean).abs().max() > 1e-3
    expected = edited(method, states, chunk, draws["next_edit"])
    found = method.critic_losses(batch, draws).next_action
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # What acts draws the flow's noise first, and the edit's after it.
    noise = GeneratorNoise(torch.Generator().manual_seed(7), BATCH, torch.device("cpu"))
    again = GeneratorNoise(torch.Generator().manual_seed(7), BATCH, torch.device("cpu"))
    acted = method.actor().chunk(method.policy.encode(states), noise)
    first, second = (again.normal(method.policy.chunk_shape) for _ in range(2))
    by_hand = edited(method, states, flowed(method, online, states, first), second)
    torch.testing.assert_close(acted, by_hand, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_sac_flows_target_has_the_entropy_of_the_next_path(temperature: float) -> None:
    config = SACFlowConfig(
        hidden_dims=(16,), gate_dim=8, num_steps=3, initial_temperature=temperature
    )
    method, batch = made(config), batch_of(5)
    draws = method.draw(batch, torch.Generator().manual_seed(6))
    states, sigma = batch.next_observation, config.acting_noise
    x, *steps = draws["next"].unbind(1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    for i, eps in enumerate(steps):
        mean = x + method.field.velocity(x, torch.full((BATCH,), i / 3), states) / 3
        x = mean + sigma * eps
        log_p += torch.distributions.Normal(mean, sigma).log_prob(x).flatten(1).sum(1)
    log_p -= torch.log(1.0 - x.tanh().square()).flatten(1).sum(1)
    if config.relative_entropy:
        own = torch.distributions.Normal(0.0, 1.0).entropy() * 2
        log_p += own + 3 * 2 * torch.distributions.Normal(0.0, sigma).entropy()
    alpha = float(method.own["temperature"]())
    assert alpha * float(log_p.abs().mean()) > 0.01
    value = method.critic.next_value(states, x.tanh()) - alpha * log_p
    found = method.critic_losses(batch, draws).loss
    torch.testing.assert_close(found, loss_of(method, batch, value), rtol=1e-4, atol=1e-5)

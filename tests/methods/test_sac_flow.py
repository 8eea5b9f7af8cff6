"""SAC Flow's path, its density and its gradient against independent truths."""

import itertools
import math

import pytest
import torch
from test_bandit import SHAPE, transitions
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.kernel_choice import chosen_kernels
from vla_trqam.methods.sac_flow import (
    GatedField,
    SACFlow,
    SACFlowConfig,
    noise_entropy,
    noisy_path,
)

B, F, H, A, K, SIGMA = 4, 3, 2, 2, 4, 0.3
CONFIG = SACFlowConfig(hidden_dims=(8,), gate_dim=6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def field_of(*, at_first: bool = False) -> GatedField:
    torch.manual_seed(0)
    field = GatedField(F, H * A, CONFIG).double()
    if not at_first:
        with torch.no_grad():
            field.gate_out.weight.copy_(normal(H * A, 6, seed=1))
            field.gate_out.bias.copy_(normal(H * A, seed=2))
    return field


def rolled(field: GatedField, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    with chosen_kernels("plain"):
        return noisy_path(lambda x, tau: field.velocity(x, tau, features), noise, SIGMA)


def test_the_gate_is_open_at_first() -> None:
    field, features, x = field_of(at_first=True), normal(B, F), normal(B, H, A, seed=1)
    tau = torch.full((B,), 0.25, dtype=torch.float64)
    with chosen_kernels("plain"):
        found = field.velocity(x, tau, features)
        aim = field.aim(torch.cat([features, x.flatten(1), tau.unsqueeze(1)], dim=1)).view_as(x)
    expected = (aim - x) / (1.0 + math.exp(-5.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_paths_density_is_that_of_its_steps_one_by_one() -> None:
    field, features, noise = field_of(), normal(B, F), normal(B, 1 + K, H, A, seed=3)
    action, log_p = rolled(field, features, noise)
    for row in range(B):
        x, total = noise[row : row + 1, 0], 0.0
        total += float(torch.distributions.Normal(0.0, 1.0).log_prob(x).sum())
        for i in range(K):
            tau = torch.full((1,), i / K, dtype=torch.float64)
            with torch.no_grad(), chosen_kernels("plain"):
                mean = x + field.velocity(x, tau, features[row : row + 1]) / K
            x = mean + SIGMA * noise[row, 1 + i]
            total += float(torch.distributions.Normal(mean, SIGMA).log_prob(x).sum())
        total -= float(torch.log(1.0 - torch.tanh(x) ** 2).sum())
        torch.testing.assert_close(action[row], torch.tanh(x)[0])
        assert float(log_p[row].detach()) == pytest.approx(total, rel=1e-9)


def test_on_a_linear_field_it_is_the_exact_gaussians_of_the_whole_path() -> None:
    """With v = c x + b the K + 1 states are jointly Gaussian: their law by its covariance."""
    c, b = -0.7, 0.4
    noise = normal(B, 1 + K, 1, 1, seed=4)
    action, log_p = noisy_path(lambda x, tau: c * x + b, noise, SIGMA)
    keep = 1.0 + c / K
    moves = torch.zeros(1 + K, 1 + K, dtype=torch.float64)  # states from the noise
    means = torch.zeros(1 + K, dtype=torch.float64)
    moves[0, 0] = 1.0
    for i in range(K):
        moves[i + 1] = keep * moves[i]
        moves[i + 1, i + 1] = SIGMA
        means[i + 1] = keep * means[i] + b / K
    states = noise.view(B, 1 + K) @ moves.T + means
    law = torch.distributions.MultivariateNormal(means, moves @ moves.T)
    end = states[:, -1]
    torch.testing.assert_close(action.view(B), torch.tanh(end))
    exact = law.log_prob(states) - torch.log(1.0 - torch.tanh(end) ** 2)
    torch.testing.assert_close(log_p, exact)


def test_the_gradient_goes_through_every_step_of_the_chain() -> None:
    """By finite differences in every weight: of the action and of the density."""
    field, features, noise = field_of(), normal(B, F), normal(B, 1 + K, H, A, seed=5)
    weights = normal(B, H, A, seed=6)

    def value() -> Tensor:
        action, log_p = rolled(field, features, noise)
        return (weights * action).sum() + 0.3 * log_p.sum()

    gradients = torch.autograd.grad(value(), list(field.parameters()))
    step = 1e-6
    for parameter, gradient in zip(field.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 4)):
            kept, ends = flat[index].item(), []
            for sign in (1.0, -1.0):
                flat[index] = kept + sign * step
                ends.append(float(value().detach()))
            flat[index] = kept
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient.view(-1)[index]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_far_action_has_a_finite_density() -> None:
    noise = 100.0 * normal(B, 1 + K, H, A)
    action, log_p = noisy_path(lambda x, tau: torch.zeros_like(x), noise, SIGMA)
    assert float(action.abs().max()) == 1.0
    assert bool(torch.isfinite(log_p).all())


def test_the_noises_entropy_is_all_of_the_paths_but_the_squash() -> None:
    noise = normal(20000, 1 + K, H, A)
    action, log_p = noisy_path(lambda x, tau: -x, noise, SIGMA)
    squash = torch.log(1.0 - action**2).flatten(1).sum(dim=1).mean()
    expected = noise_entropy(H * A, K, SIGMA) + float(squash)
    assert float(-log_p.mean()) == pytest.approx(expected, abs=0.05)


def method_of(**knobs: float) -> SACFlow:
    torch.manual_seed(1)
    rates = {"actor_lr": 5e-3, "critic_lr": 3e-3, "bc_weight": 0.0, "cloning_weight": 0.0}
    config = SACFlowConfig(hidden_dims=(32,), gate_dim=8, **rates | knobs)  # type: ignore[arg-type]
    return SACFlow(MLPFlowPolicy(SHAPE), Critic(CriticEnsemble(1, 2, (32, 32), 2)), config)


def trained(method: SACFlow, updates: int) -> dict[str, float]:
    """On rewards that are the larger the nearer an action is to a corner of the box."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(updates):
        batch = transitions(generator)
        batch.chunk_return.copy_(-(batch.action - 1.0).square().flatten(1).sum(1))
        method.update(batch, generator)
    return method.metrics()


def test_the_entropy_comes_to_its_target() -> None:
    """Without it the policy would sit in the corner, where the squash has no entropy at all."""
    found = trained(method_of(target_entropy=-0.5), 400)
    assert found["entropy"] == pytest.approx(-1.0, abs=0.15)
    assert found["temperature"] > 0.2
    assert trained(method_of(target_entropy=-50.0), 250)["entropy"] < -1.5


def test_the_temperature_falls_while_the_entropy_is_above_its_target() -> None:
    low, high = (trained(method_of(target_entropy=t), 20)["temperature"] for t in (-50.0, 50.0))
    assert low < 0.2 < high


def test_cloning_through_tanh_plays_the_data_and_without_it_tanh_of_the_data() -> None:
    """Data at 0.9: the flow's end is atanh(0.9), or 0.9, of which tanh is 0.72."""
    for through, expected in ((True, 0.9), (False, math.tanh(0.9))):
        knobs = {"cloning_weight": 1.0, "clone_through_tanh": through, "initial_temperature": 1e-6}
        method = method_of(**knobs)
        # The critic alone would move it: it is held still.
        generator = torch.Generator().manual_seed(2)
        for parameter in method.critic.parameters():
            parameter.data.zero_()
        for _ in range(250):
            batch = transitions(generator)
            batch.action[:], batch.chunk_return[:] = 0.9, 0.0
            method.update(batch, generator)
        noise = torch.randn(500, 1 + method.config.num_steps, 1, 2, generator=generator)
        with torch.no_grad():
            action, _ = method.path(torch.zeros(500, 1), noise, 0.02)
        assert float(action.mean()) == pytest.approx(expected, abs=0.03)


def test_the_distance_to_the_datas_actions_is_a_mean_over_numbers_and_weighs_as_asked() -> None:
    generator = torch.Generator().manual_seed(3)
    plain, pulled = method_of(), method_of(bc_weight=3.0)
    batch = transitions(generator)
    batch.valid[1, -1] = False  # what was not executed pulls nowhere
    draws = plain.draw(batch, generator)
    with torch.no_grad():
        action, _ = plain.path(batch.observation, draws["actor"], plain.config.step_noise)
    distances = [
        float((action[row, step, number] - batch.action[row, step, number]) ** 2)
        if batch.valid[row, step]
        else 0.0
        for row, step, number in itertools.product(*map(range, batch.action.shape))
    ]
    distance = sum(distances) / len(distances)
    found, more = plain.losses(batch, draws), pulled.losses(batch, draws)
    assert float(found.logged["action_bc_loss"]) == pytest.approx(distance, rel=1e-5)
    assert (more.loss - found.loss).item() == pytest.approx(3.0 * distance, rel=1e-4)

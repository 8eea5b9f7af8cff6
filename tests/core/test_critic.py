import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vla_trqam.critic import Critic, CriticEnsemble, ema_update
from vla_trqam.errors import UserError

FEATURES, CHUNK, BATCH = 4, (2, 3), 7
HIDDEN = (16, 12)


def ensemble_of(
    size: int = 3, layer_norm: bool = True, dtype: torch.dtype = torch.float32
) -> CriticEnsemble:
    """Random weights everywhere, biases and norms included."""
    torch.manual_seed(size)
    ensemble = CriticEnsemble(FEATURES, CHUNK[0] * CHUNK[1], HIDDEN, size, layer_norm=layer_norm)
    for parameter in ensemble.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return ensemble.to(dtype)


def inputs_of(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, FEATURES, generator=generator, dtype=dtype)
    return features, scale * torch.randn(BATCH, *CHUNK, generator=generator, dtype=dtype)


def naive_member(ensemble: CriticEnsemble, member: int, features: Tensor, action: Tensor) -> Tensor:
    x = torch.cat([features, action.reshape(len(action), -1)], dim=1)
    weights = dict(ensemble.named_parameters())
    depth = len(HIDDEN) + 1
    for i in range(depth):
        x = x @ weights[f"layers.{i}.weight"][member] + weights[f"layers.{i}.bias"][member]
        if i < depth - 1:
            x = F.gelu(x, approximate="tanh")
            if f"norms.{i}.scale" in weights:
                scale, bias = (weights[f"norms.{i}.{name}"][member] for name in ("scale", "bias"))
                x = F.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)
    return x[:, 0]


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_ensemble_is_its_members_one_by_one(size: int, layer_norm: bool) -> None:
    ensemble = ensemble_of(size, layer_norm, torch.float64)
    features, action = inputs_of(torch.float64)
    expected = torch.stack([naive_member(ensemble, e, features, action) for e in range(size)])
    q = ensemble(features, action)
    assert q.shape == (size, BATCH)
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_parameter_gradients_are_the_members_own(layer_norm: bool) -> None:
    ensemble = ensemble_of(3, layer_norm, torch.float64)
    features, action = inputs_of(torch.float64)
    weight = torch.randn(3, BATCH, dtype=torch.float64)
    parameters = list(ensemble.parameters())
    ours = torch.autograd.grad((ensemble(features, action) * weight).sum(), parameters)
    naive = torch.stack([naive_member(ensemble, e, features, action) for e in range(3)])
    expected = torch.autograd.grad((naive * weight).sum(), parameters)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_members_start_different() -> None:
    ensemble = CriticEnsemble(FEATURES, CHUNK[0] * CHUNK[1], HIDDEN, 4)
    q = ensemble(*inputs_of())
    assert q.std(dim=0).min().item() > 1e-3


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("clip_actions", [True, False])
def test_the_action_gradient_is_autograds(clip_actions: bool, layer_norm: bool) -> None:
    critic = Critic(ensemble_of(3, layer_norm, torch.float64), clip_actions=clip_actions)
    features, action = inputs_of(torch.float64, scale=1.2)
    gradient, value = critic.action_gradient(features, action)
    point = action.clone().requires_grad_(True)
    inside = point.clamp(-1, 1) if clip_actions else point
    members = [naive_member(critic.target, e, features, inside) for e in range(3)]
    mean = torch.stack(members).mean(0)
    (expected,) = torch.autograd.grad(mean.sum(), point)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, mean.detach(), rtol=1e-10, atol=1e-12)
    assert not gradient.requires_grad
    assert not value.requires_grad


def test_the_action_gradient_is_the_finite_difference_of_the_mean_target_value() -> None:
    critic = Critic(ensemble_of(4, dtype=torch.float64), clip_actions=False)
    features, action = inputs_of(torch.float64)
    gradient, _ = critic.action_gradient(features, action)
    step = 1e-6
    for h in range(CHUNK[0]):
        for a in range(CHUNK[1]):
            moved = torch.zeros_like(action)
            moved[:, h, a] = step
            with torch.no_grad():
                up = critic.target(features, action + moved).mean(0)
                down = critic.target(features, action - moved).mean(0)
            difference = (up - down) / (2 * step)
            torch.testing.assert_close(gradient[:, h, a], difference, rtol=1e-6, atol=1e-7)


def test_beyond_the_box_the_clipped_gradient_is_zero_and_the_other_is_not() -> None:
    ensemble = ensemble_of()
    features, action = inputs_of(scale=2.0)
    outside = action.abs() > 1
    assert bool(outside.any())
    assert not bool(outside.all())
    clipped, _ = Critic(ensemble).action_gradient(features, action)
    free, _ = Critic(ensemble, clip_actions=False).action_gradient(features, action)
    assert float(clipped[outside].abs().max()) == 0.0
    assert float(clipped[~outside].abs().min()) > 0.0
    assert float(free[outside].abs().min()) > 0.0


def test_the_action_gradient_is_the_targets_and_leaves_no_trace_on_any_parameter() -> None:
    critic = Critic(ensemble_of())
    features, action = inputs_of()
    before, _ = critic.action_gradient(features, action)
    with torch.no_grad():
        for parameter in critic.online.parameters():
            parameter.add_(1.0)
    after, _ = critic.action_gradient(features, action)
    assert torch.equal(before, after)
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert not any(parameter.requires_grad for parameter in critic.target.parameters())


def test_it_works_where_gradients_are_switched_off() -> None:
    critic = Critic(ensemble_of())
    with torch.no_grad():
        gradient, _ = critic.action_gradient(*inputs_of())
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("pessimism", [0.0, 0.5, 3.0])
def test_the_next_value_is_the_targets_pessimistic_one(pessimism: float) -> None:
    critic = Critic(ensemble_of(5), pessimism=pessimism)
    features, action = inputs_of()
    with torch.no_grad():
        for parameter in critic.online.parameters():
            parameter.zero_()
    value = critic.next_value(features, action)
    q = critic.target(features, action)
    expected = q.mean(0) - pessimism * ((q - q.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad


def test_the_target_follows_by_its_rate() -> None:
    critic = Critic(ensemble_of(), target_rate=0.25)
    with torch.no_grad():
        for parameter in critic.online.parameters():
            parameter.add_(torch.randn_like(parameter))
    old = copy.deepcopy(critic.target.state_dict())
    critic.update_target()
    new, online = critic.target.state_dict(), critic.online.state_dict()
    for key, value in new.items():
        torch.testing.assert_close(value, 0.75 * old[key] + 0.25 * online[key])


def test_the_ema_at_rate_one_copies_and_at_zero_stays() -> None:
    average, current = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3))
    before = average.detach().clone()
    ema_update([average], [current], 0.0)
    assert torch.equal(average, before)
    ema_update([average], [current], 1.0)
    assert torch.equal(average, current)


def test_a_pessimistic_adjoint_starts_from_the_pessimistic_values_finite_difference() -> None:
    critic = Critic(ensemble_of(4).double(), adjoint_pessimism=1.5)
    features, action = inputs_of(torch.float64, scale=0.3)
    gradient, value = critic.action_gradient(features, action)

    def pessimistic(point: Tensor) -> Tensor:
        q = critic.target(features, point).detach()
        return q.mean(0) - 1.5 * ((q - q.mean(0)) ** 2).mean(0).sqrt()

    torch.testing.assert_close(value, pessimistic(action))
    step = 1e-6
    for index in ((0, 0), (CHUNK[0] - 1, CHUNK[1] - 1)):
        moved = torch.zeros_like(action)
        moved[:, *index] = step
        slope = (pessimistic(action + moved) - pessimistic(action - moved)) / (2 * step)
        torch.testing.assert_close(gradient[:, *index], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["pessimism", "adjoint_pessimism"])
@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_pessimism_out_of_range_is_refused(name: str, rho: float) -> None:
    with pytest.raises(UserError, match=f"^{name} is {rho}; it must be"):
        Critic(ensemble_of(), **{name: rho})


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_target_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=f"target_rate is {rate}; it must be"):
        Critic(ensemble_of(), target_rate=rate)


@pytest.mark.parametrize("hidden_dims", [(), (8, 0), (-1,)])
def test_hidden_dims_without_a_positive_width_are_refused(hidden_dims: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"hidden_dims is .*; it must hold widths of at least 1"):
        CriticEnsemble(FEATURES, 6, hidden_dims)


@pytest.mark.parametrize("size", [0, -1])
def test_an_ensemble_without_members_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"ensemble_size is {size}; it must be at least 1"):
        CriticEnsemble(FEATURES, 6, HIDDEN, size)


def test_noise_on_the_action_gradient_is_of_the_size_that_is_asked() -> None:
    ensemble = ensemble_of(3, dtype=torch.float64)
    features, action = inputs_of(torch.float64, scale=0.8)
    noise = torch.randn(BATCH, *CHUNK, dtype=torch.float64)
    right, value = Critic(ensemble).action_gradient(features, action, noise=noise)
    wrong, same = Critic(ensemble, gradient_noise=0.5).action_gradient(
        features, action, noise=noise
    )
    assert torch.equal(value, same)
    beyond = action.abs() > 1.0
    assert bool(beyond.any())
    assert not bool(wrong[beyond].any())
    for row in range(BATCH):
        there = ~beyond[row]
        size = right[row][there].square().mean().sqrt()
        torch.testing.assert_close((wrong - right)[row][there], 0.5 * size * noise[row][there])


def test_no_noise_is_asked_by_default_and_none_is_added_where_none_is_given() -> None:
    features, action = inputs_of()
    critic = Critic(ensemble_of(3), gradient_noise=0.5)
    quiet = Critic(ensemble_of(3))
    given, _ = critic.action_gradient(features, action)
    expected, _ = quiet.action_gradient(features, action)
    ignored, _ = quiet.action_gradient(features, action, noise=torch.ones(BATCH, *CHUNK))
    assert torch.equal(given, expected)
    assert torch.equal(ignored, expected)
    with pytest.raises(UserError, match=r"gradient_noise is -1\.0; it must be finite"):
        Critic(ensemble_of(3), gradient_noise=-1.0)

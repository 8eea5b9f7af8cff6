"""The critic's node of autograd against the plain way beside the model."""

import pytest
import torch
from torch import Tensor

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.kernel_choice import Kernels, chosen_kernels

FEATURES, CHUNK = 4, (2, 3)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = [
    ((16, 12), 3, 7, True),
    ((16, 12), 3, 7, False),
    ((8,), 1, 1, True),
    ((24, 16, 8), 10, 33, True),
    ((8, 8), 2, 1, False),
]


def ensemble_of(
    hidden: tuple[int, ...], members: int, layer_norm: bool, dtype: torch.dtype
) -> CriticEnsemble:
    torch.manual_seed(members)
    size = CHUNK[0] * CHUNK[1]
    ensemble = CriticEnsemble(FEATURES, size, hidden, members, layer_norm=layer_norm)
    for parameter in ensemble.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return ensemble.to(dtype)


def found_by(
    kernels: Kernels, ensemble: CriticEnsemble, inputs: tuple[Tensor, Tensor], cotangent: Tensor
) -> list[Tensor]:
    """The values and their pullback to features, action and all weights."""
    points = [value.clone().requires_grad_(True) for value in inputs]
    with chosen_kernels(kernels):
        q = ensemble(*points)
        gradients = torch.autograd.grad(q, [*points, *ensemble.parameters()], cotangent)
    return [q.detach(), *gradients]


def inputs_of(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, FEATURES, generator=generator, dtype=dtype)
    return features, torch.randn(rows, *CHUNK, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "members", "rows", "layer_norm"), SHAPES)
def test_values_and_all_gradients_are_the_plain_ones(
    hidden: tuple[int, ...], members: int, rows: int, layer_norm: bool, dtype: torch.dtype
) -> None:
    ensemble, inputs = ensemble_of(hidden, members, layer_norm, dtype), inputs_of(rows, dtype)
    cotangent = torch.randn(members, rows, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = found_by("fast", ensemble, inputs, cotangent)
    plain = found_by("plain", ensemble, inputs, cotangent)
    for mine, other in zip(ours, plain, strict=True):
        assert mine.dtype == dtype
        size = float(other.abs().max())
        torch.testing.assert_close(
            mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + size)
        )


@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_gradient_passes_gradcheck(layer_norm: bool) -> None:
    ensemble = ensemble_of((5, 4), 2, layer_norm, torch.float64)
    features, action = inputs_of(3, torch.float64)
    assert torch.autograd.gradcheck(ensemble, (features.requires_grad_(), action.requires_grad_()))


def test_without_gradients_the_values_are_the_same_to_the_bit() -> None:
    ensemble, inputs = ensemble_of((16, 12), 3, True, torch.float32), inputs_of(7, torch.float32)
    with torch.no_grad():
        q = ensemble(*inputs)
    assert torch.equal(q, ensemble(*inputs).detach())


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_frozen_weights_pass_the_actions_gradient_and_take_none(kernels: Kernels) -> None:
    ensemble, (features, action) = (
        ensemble_of((16, 12), 3, True, torch.float32),
        inputs_of(7, torch.float32),
    )
    found = []
    with chosen_kernels(kernels):
        for frozen in (True, False):
            point = action.clone().requires_grad_(True)
            ensemble.zero_grad()
            ensemble(features, point, frozen=frozen).sum().backward()
            assert all((p.grad is None) == frozen for p in ensemble.parameters())
            found.append(point.grad)
    assert found[0] is not None
    assert torch.equal(found[0], found[1])


def test_only_the_plain_way_has_a_second_derivative() -> None:
    ensemble = ensemble_of((8, 8), 2, True, torch.float64)
    features, action = inputs_of(3, torch.float64)
    with chosen_kernels("plain"):
        assert torch.autograd.gradgradcheck(
            lambda a: ensemble(features, a), action.requires_grad_()
        )
    (first,) = torch.autograd.grad(ensemble(features, action).sum(), action, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.square().sum(), action)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_autocast_lowers_neither_the_values_nor_the_actions_gradient(kernels: Kernels) -> None:
    critic = Critic(ensemble_of((16, 12), 3, True, torch.float32))
    inputs = inputs_of(7, torch.float32)
    with chosen_kernels(kernels):
        alone = critic.action_gradient(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            under = critic.action_gradient(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(alone, under, strict=True))

"""Shifted Euler is the authors' code to the last bit of float32, however the step is put together.

The formulas here are those that the library had before a step was one object, word for word: runs
that were recorded with them are repeated exactly.
"""

import math

import pytest
import torch
from torch import Tensor

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import sample_memoryless_sde
from vla_trqam.time_grid import ShiftedEuler, TimeGrid
from vla_trqam.trust_region import path_kl_per_step

COUNTS = range(1, 201)
CHUNK = (3, 1, 2)


def shifted_tau(steps: int, shift: float, i: int) -> float:
    return (i + shift) / steps


def scales_squared(steps: int, shift: float) -> list[float]:
    h = 1.0 / steps
    return [
        2.0 * (1.0 - i / steps + shift * h) / shifted_tau(steps, shift, i) for i in range(steps)
    ]


def random(steps: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(steps)
    return torch.randn(count, steps, *CHUNK, generator=generator)


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_losss_value_and_gradient_are_the_old_formulas_to_the_bit(shift: float) -> None:
    for steps in COUNTS:
        gap, adjoint = random(steps, 2)
        lam, grid = 0.3 + 0.1 * steps, TimeGrid(steps, ShiftedEuler(shift))
        scales = gap.new_tensor(scales_squared(steps, shift)).view(-1, 1, 1, 1)
        sigma = (scales / lam).sqrt()
        residual = (gap.requires_grad_() + (0.5 * sigma.square()) * adjoint) * (2.0 / sigma)
        old = residual.square().sum() / CHUNK[0]
        new = adjoint_matching_loss(gap, adjoint, grid, lam)
        assert torch.equal(new, old), steps
        gradients = (torch.autograd.grad(loss, gap)[0] for loss in (new, old))
        assert torch.equal(*gradients), steps


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_kl_is_the_old_formula_to_the_bit(shift: float) -> None:
    for steps in COUNTS:
        (gap,) = random(steps, 1)
        squared = gap.flatten(2).square().sum(dim=2).mean(dim=1)
        old = squared * (2.0 / steps) / gap.new_tensor(scales_squared(steps, shift))
        assert torch.equal(path_kl_per_step(gap, TimeGrid(steps, ShiftedEuler(shift))), old), steps


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_path_is_the_old_recursion_to_the_bit(shift: float) -> None:
    for steps in COUNTS[::7]:
        (noise,) = random(steps, 1)
        h, x = 1.0 / steps, noise[0].clone()
        for i, scale in enumerate(scales_squared(steps, shift)):
            velocity = torch.sin(x)
            if i == steps - 1:
                x = torch.add(x, -velocity, alpha=h)
                break
            following = torch.mul(x, 1.0 - h / shifted_tau(steps, shift, i))
            following.add_(velocity, alpha=2.0 * h)
            x = following.add_(noise[i], alpha=math.sqrt(h * scale))
        path = sample_memoryless_sde(
            lambda x, tau: torch.sin(x),
            noise[0],
            noise,
            TimeGrid(steps, ShiftedEuler(shift)),
            base_velocity=lambda x, tau: -torch.sin(x),
        )
        assert torch.equal(path.x_1, x), steps


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_adjoint_is_the_old_recursion_to_the_bit(shift: float) -> None:
    for steps in COUNTS[::7]:
        (terminal,) = random(1, 1)[0]
        a, expected = terminal, []
        for i in reversed(range(steps)):
            before = torch.mul(a, 1.0 - (1.0 / steps) / shifted_tau(steps, shift, i))
            a = before.add_(torch.cos(a), alpha=2.0 / steps)
            expected.insert(0, a)
        found = lean_adjoint(
            terminal, lambda i, a: torch.cos(a), TimeGrid(steps, ShiftedEuler(shift))
        )
        assert torch.equal(found, torch.stack(expected)), steps

"""A two-mode base and a bump of reward on one mode: samples follow ``pi_base exp(Q / lam)``."""

import pytest
import torch
from flow_problems import SCHEMES, FunctionPolicy, Mixture
from torch import Tensor, nn

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import Velocity, sample_memoryless_sde, sample_path_and_next_action
from vla_trqam.time_grid import Scheme, TimeGrid

STEPS, LAM = 40, 0.5
LIMIT, NODES, BINS = 4.0, 41, 40
BASE = Mixture((-1.0, 1.0), 0.25)
# Sampling noise of 40 bins and the discretisation at K = 40 together reach 0.035.
BOUND = 0.06


def bump(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((x - 1.0) / 0.5) ** 2)


def bump_slope(x: Tensor) -> Tensor:
    return -(x - 1.0) / 0.25 * bump(x)


class TabularField(nn.Module):
    """The base plus a table over flow step and x, linear between its nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(STEPS, NODES))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        row = self.table[round(float(tau[0]) * STEPS)]
        position = ((x + LIMIT) / (2 * LIMIT) * (NODES - 1)).clamp(0, NODES - 1.001)
        node = position.floor().long()
        weight = position - node
        return BASE.velocity(x, tau) + (1 - weight) * row[node] + weight * row[node + 1]


def train(grid: TimeGrid, generator: torch.Generator) -> TabularField:
    field = TabularField()
    policy = FunctionPolicy(field, BASE.velocity, (1, 1), STEPS)
    updates, batch = 120, 1024
    optimizer = torch.optim.Adam(field.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        fields = policy.path_fields(None, None)
        noise = torch.randn(STEPS + 1, batch, 1, 1, generator=generator)
        path, _ = sample_path_and_next_action(fields, noise[0], noise[1:], noise[0, :1], grid)
        adjoint = lean_adjoint(-bump_slope(path.x_1), fields.base_pullback, grid)
        loss = adjoint_matching_loss(fields.tuned() - fields.base(), adjoint, grid, LAM)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


def sampled(field: Velocity, grid: TimeGrid, generator: torch.Generator) -> Tensor:
    """The share of 40,000 samples in every bin."""
    noise = torch.randn(STEPS + 1, 40_000, 1, 1, generator=generator)
    with torch.no_grad():
        path = sample_memoryless_sde(field, noise[0], noise[1:], grid, base_velocity=BASE.velocity)
    counts, _ = torch.histogram(path.x_1.flatten(), torch.linspace(-LIMIT, LIMIT, BINS + 1))
    return counts / counts.sum()


def tilted(lam: float) -> Tensor:
    """``pi_base exp(Q / lam)`` in every bin, integrated on a fine grid."""
    width = 2 * LIMIT / (BINS * 50)
    x = -LIMIT + width * (torch.arange(BINS * 50) + 0.5)
    mass = (BASE.density(x) * torch.exp(bump(x) / lam)).view(BINS, 50).sum(1)
    return mass / mass.sum()


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mixtures_field_carries_noise_to_the_mixture(scheme: Scheme) -> None:
    base = sampled(BASE.velocity, TimeGrid(STEPS, scheme), torch.Generator().manual_seed(1))
    assert total_variation(base, tilted(float("inf"))) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_follow_the_base_tilted_by_the_reward_over_lambda(scheme: Scheme) -> None:
    generator, grid = torch.Generator().manual_seed(0), TimeGrid(STEPS, scheme)
    found = sampled(train(grid, generator), grid, generator)
    assert total_variation(found, tilted(LAM)) < BOUND
    # The bound tells apart: no training at all, and a lambda off by a factor of two either way.
    untuned = sampled(BASE.velocity, grid, generator)
    assert total_variation(untuned, tilted(LAM)) > 2 * BOUND
    assert total_variation(found, tilted(LAM / 2)) > 2 * BOUND
    assert total_variation(found, tilted(LAM * 2)) > 2 * BOUND

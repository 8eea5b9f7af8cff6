"""``Q(x) = w . x`` on a Gaussian base: training finds its optimum N(s^2 w / lam, s^2 I)."""

import numpy as np
import pytest
import torch
from closed_forms import chain_mean, gaussian, moves_of, offset_kl, optimal_offsets
from flow_problems import DOUBLE, FunctionPolicy, gaussian_field, gaussian_gain, propagate
from torch import Tensor, nn

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, per_step
from vla_trqam.trust_region import path_kl

VARIANCE, LAM = 0.5, 1.5
W = (1.0, -0.5)


class TimeIndexedAffine(nn.Module):
    """``v_i(x) = gain_i x + offset_i``: the optimum lies in this family."""

    def __init__(self, num_flow_steps: int) -> None:
        super().__init__()
        self.steps = num_flow_steps
        gains = [0.5 * gaussian_gain(i / self.steps, VARIANCE) for i in range(self.steps)]
        self.gain = nn.Parameter(torch.tensor(gains, dtype=DOUBLE))
        self.offset = nn.Parameter(torch.zeros(self.steps, len(W), dtype=DOUBLE))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        i = round(float(tau[0]) * self.steps)
        return self.gain[i] * x + self.offset[i]


def train(grid: TimeGrid) -> TimeIndexedAffine:
    generator, steps = torch.Generator().manual_seed(0), grid.num_flow_steps
    tuned, chunk = TimeIndexedAffine(steps), (1, len(W))
    policy = FunctionPolicy(tuned, gaussian_field(VARIANCE), chunk, steps)
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=0.05)
    updates, batch = 400, 16
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    gradient = torch.tensor(W, dtype=DOUBLE).expand(batch, *chunk)
    for _ in range(updates):
        fields = policy.path_fields(None, None)
        noise = torch.randn(steps + 2, batch, *chunk, dtype=DOUBLE, generator=generator)
        sample_path_and_next_action(fields, noise[0], noise[2:], noise[1], grid)
        adjoint = lean_adjoint(-gradient, fields.base_pullback, grid)
        loss = adjoint_matching_loss(fields.tuned() - fields.base(), adjoint, grid, LAM)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuned


TRAINED = [ShiftedEuler(), ShiftedEuler(adjoint_time="same", final_step="sde"), Posterior()]


@pytest.mark.parametrize("scheme", TRAINED)
def test_training_reaches_the_tilted_gaussian(scheme: Scheme) -> None:
    steps = 10
    grid, moves, gain = TimeGrid(steps, scheme), moves_of(scheme, steps), gaussian(VARIANCE)
    tuned, base = train(grid), gaussian_field(VARIANCE)
    offsets = optimal_offsets(moves, gain, LAM)
    gains = [gain(i / steps) for i in range(steps)]
    np.testing.assert_allclose(tuned.gain.detach().numpy(), gains, atol=2e-3)
    for dim, w in enumerate(W):
        np.testing.assert_allclose(tuned.offset[:, dim].detach().numpy(), w * offsets, atol=2e-3)

        def velocity(x: Tensor, tau: Tensor, dim: int = dim) -> Tensor:
            return tuned(x.expand(-1, 1, len(W)), tau)[:, :, dim : dim + 1]

        end = propagate(velocity, grid, base)
        assert end.mean == pytest.approx(w * chain_mean(moves, gain, offsets), abs=2e-3)
        untuned = propagate(base, grid, base)
        assert end.variance == pytest.approx(untuned.variance, rel=1e-2)


def library_optimum(grid: TimeGrid) -> tuple[np.ndarray, float, float]:
    """Offsets, mean and path KL by the library: its adjoint, its sampler, its path KL."""
    base = gaussian_field(VARIANCE)

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        tau = grid.steps[step].adjoint_tau
        assert tau is not None
        return gaussian_gain(tau, VARIANCE) * cotangent

    adjoint = lean_adjoint(-torch.ones(1, 1, 1, dtype=DOUBLE), pullback, grid)
    half_scales = [step.variance / step.gain for step in grid.steps]
    gap = -per_step(half_scales, adjoint) * adjoint / LAM

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return base(x, tau) + gap[round(float(tau[0]) * grid.num_flow_steps)]

    end = propagate(velocity, grid, base)
    return gap.flatten().numpy(), end.mean, float(path_kl(gap, grid))


# How far the KL and the mean may be off at 200 steps, and the mean at 50.
CLOSE = [
    (ShiftedEuler(), 0.02, 0.07),
    (ShiftedEuler(final_step="sde"), 0.02, 0.07),
    (ShiftedEuler(adjoint_time="same"), 0.02, 0.07),
    (ShiftedEuler(adjoint_time="same", final_step="sde"), 0.02, 0.07),
    (Posterior(), 0.03, 0.11),
]


@pytest.mark.parametrize(("scheme", "at_200", "at_50"), CLOSE)
def test_the_optimum_tends_to_the_tilted_gaussian_as_steps_are_added(
    scheme: Scheme, at_200: float, at_50: float
) -> None:
    mean, kl, gain = VARIANCE / LAM, VARIANCE / (2 * LAM**2), gaussian(VARIANCE)
    kl_gaps, mean_gaps = [], []
    for steps in (10, 50, 200):
        offsets, found_mean, found_kl = library_optimum(TimeGrid(steps, scheme))
        moves = moves_of(scheme, steps)
        exact = optimal_offsets(moves, gain, LAM)
        np.testing.assert_allclose(offsets, exact, rtol=1e-10)
        expected = chain_mean(moves, gain, exact), offset_kl(moves, exact)
        assert (found_mean, found_kl) == pytest.approx(expected, rel=1e-10)
        kl_gaps.append(abs(found_kl / kl - 1))
        mean_gaps.append(abs(found_mean / mean - 1))
    # First order: four times the steps, about a quarter of the gap.
    assert kl_gaps[0] > 3 * kl_gaps[1] > 9 * kl_gaps[2]
    assert max(kl_gaps[2], mean_gaps[2]) < at_200
    assert mean_gaps[1] < at_50

"""``Q(x) = w . x`` on a Gaussian base: training finds its optimum N(s^2 w / lam, s^2 I)."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from flow_problems import DOUBLE, FunctionPolicy, gaussian_field, gaussian_gain, propagate
from torch import Tensor, nn

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import FinalStep, sample_path_and_next_action
from vla_trqam.time_grid import AdjointTime, TimeGrid
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


class Optimum(NamedTuple):
    """The discretised problem's solution per unit of w, by its linear recursions."""

    offsets: np.ndarray
    mean: float
    path_kl: float


def exact_optimum(steps: int, final_step: FinalStep, adjoint_time: AdjointTime) -> Optimum:
    h, adjoint, mean = 1 / steps, -1.0, 0.0
    noise = [2 * (1 - i * h + h) / (i * h + h) for i in range(steps)]
    offsets = np.zeros(steps)
    for i in reversed(range(steps)):
        gain = gaussian_gain((i + (adjoint_time == "next")) * h, VARIANCE)
        adjoint *= 1 + h * (2 * gain - 1 / (i * h + h))
        offsets[i] = -noise[i] * adjoint / (2 * LAM)
    for i in range(steps):
        gain = gaussian_gain(i * h, VARIANCE)
        if i == steps - 1 and final_step == "noiseless_base":
            mean *= 1 + h * gain
        else:
            mean += h * (2 * (gain * mean + offsets[i]) - mean / (i * h + h))
    return Optimum(offsets, mean, float((2 * h / np.array(noise) * offsets**2).sum()))


def train(steps: int, final_step: FinalStep, adjoint_time: AdjointTime) -> TimeIndexedAffine:
    generator = torch.Generator().manual_seed(0)
    tuned, grid, chunk = TimeIndexedAffine(steps), TimeGrid(steps), (1, len(W))
    policy = FunctionPolicy(tuned, gaussian_field(VARIANCE), chunk, steps)
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=0.05)
    updates, batch = 400, 16
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    gradient = torch.tensor(W, dtype=DOUBLE).expand(batch, *chunk)
    for _ in range(updates):
        fields = policy.path_fields(None, None)
        noise = torch.randn(steps + 2, batch, *chunk, dtype=DOUBLE, generator=generator)
        sample_path_and_next_action(
            fields,
            noise[0],
            noise[2:],
            noise[1],
            grid,
            final_step=final_step,
            adjoint_time=adjoint_time,
        )
        adjoint = lean_adjoint(-gradient, fields.base_pullback, grid)
        loss = adjoint_matching_loss(fields.tuned() - fields.base(), adjoint, grid, LAM)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuned


@pytest.mark.parametrize(
    ("final_step", "adjoint_time"), [("noiseless_base", "next"), ("sde", "same")]
)
def test_training_reaches_the_tilted_gaussian(
    final_step: FinalStep, adjoint_time: AdjointTime
) -> None:
    steps = 10
    tuned, base, grid = (
        train(steps, final_step, adjoint_time),
        gaussian_field(VARIANCE),
        TimeGrid(steps),
    )
    optimum = exact_optimum(steps, final_step, adjoint_time)
    gains = [gaussian_gain(i / steps, VARIANCE) for i in range(steps)]
    np.testing.assert_allclose(tuned.gain.detach().numpy(), gains, atol=2e-3)
    for dim, w in enumerate(W):
        np.testing.assert_allclose(
            tuned.offset[:, dim].detach().numpy(), w * optimum.offsets, atol=2e-3
        )

        def velocity(x: Tensor, tau: Tensor, dim: int = dim) -> Tensor:
            return tuned(x.expand(-1, 1, len(W)), tau)[:, :, dim : dim + 1]

        end = propagate(velocity, grid, base, final_step)
        assert end.mean == pytest.approx(w * optimum.mean, abs=2e-3)
        untuned = propagate(base, grid, base, final_step)
        assert end.variance == pytest.approx(untuned.variance, rel=1e-2)


def library_optimum(steps: int, final_step: FinalStep, adjoint_time: AdjointTime) -> Optimum:
    """The same by the library: its adjoint, its sampler, its path KL."""
    grid, base = TimeGrid(steps), gaussian_field(VARIANCE)

    def next_or_same_gain(step: int, cotangent: Tensor) -> Tensor:
        return gaussian_gain((step + (adjoint_time == "next")) / steps, VARIANCE) * cotangent

    adjoint = lean_adjoint(-torch.ones(1, 1, 1, dtype=DOUBLE), next_or_same_gain, grid)
    scales = grid.noise_scales_squared(adjoint).view(-1, 1, 1, 1)
    gap = -scales * adjoint / (2 * LAM)

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return base(x, tau) + gap[round(float(tau[0]) * steps)]

    end = propagate(velocity, grid, base, final_step)
    return Optimum(gap.flatten().numpy(), end.mean, float(path_kl(gap, grid)))


@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
@pytest.mark.parametrize("adjoint_time", ["next", "same"])
def test_the_optimum_tends_to_the_tilted_gaussian_as_steps_are_added(
    adjoint_time: AdjointTime, final_step: FinalStep
) -> None:
    mean, kl = VARIANCE / LAM, VARIANCE / (2 * LAM**2)
    kl_gaps, mean_gaps = [], []
    for steps in (10, 50, 200):
        found = library_optimum(steps, final_step, adjoint_time)
        exact = exact_optimum(steps, final_step, adjoint_time)
        np.testing.assert_allclose(found.offsets, exact.offsets, rtol=1e-10)
        assert (found.mean, found.path_kl) == pytest.approx((exact.mean, exact.path_kl), rel=1e-10)
        kl_gaps.append(abs(found.path_kl / kl - 1))
        mean_gaps.append(abs(found.mean / mean - 1))
    # First order: four times the steps, about a quarter of the gap.
    assert kl_gaps[0] > 3 * kl_gaps[1] > 9 * kl_gaps[2]
    assert max(kl_gaps[2], mean_gaps[2]) < 0.02
    assert mean_gaps[1] < 0.07

"""Path-space KL: its value, and the two inequalities that make it worth bounding."""

import itertools

import numpy as np
import pytest
import torch
from flow_problems import DOUBLE, gaussian_field, propagate
from torch import Tensor

from vla_trqam.sde import Velocity
from vla_trqam.time_grid import TimeGrid
from vla_trqam.trust_region import path_kl, path_kl_per_step

STEPS, BATCH, CHUNK = 8, 5, (2, 3)


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_a_constant_offset_costs_twice_h_over_noise_times_its_square(shift: float) -> None:
    offset = torch.randn(CHUNK, dtype=DOUBLE)
    gap = offset.expand(STEPS, BATCH, *CHUNK)
    grid, h = TimeGrid(STEPS, shift), 1 / STEPS
    square = sum(float(v) ** 2 for v in offset.flatten())
    per_step = [
        2 * h * square / (2 * (1 - i * h + shift * h) / (i * h + shift * h)) for i in range(STEPS)
    ]
    np.testing.assert_allclose(path_kl_per_step(gap, grid).numpy(), per_step, rtol=1e-12)
    assert float(path_kl(gap, grid)) == pytest.approx(sum(per_step), rel=1e-12)


def test_the_kl_is_the_batch_mean_of_each_rows_kl() -> None:
    gap, grid = torch.randn(STEPS, BATCH, *CHUNK, dtype=DOUBLE), TimeGrid(STEPS)
    rows = [float(path_kl(gap[:, b : b + 1], grid)) for b in range(BATCH)]
    assert float(path_kl(gap, grid)) == pytest.approx(np.mean(rows), rel=1e-12)


def test_equal_fields_are_at_no_distance_and_the_kl_carries_no_gradient() -> None:
    gap = torch.zeros(STEPS, BATCH, *CHUNK, requires_grad=True)
    kl = path_kl(gap, TimeGrid(STEPS))
    assert float(kl) == 0.0
    assert not kl.requires_grad


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_each_step_is_the_kl_of_the_two_gaussian_transitions(shift: float) -> None:
    """Both chains step to ``x + h (2 v - x / (tau + d))`` with the same covariance ``h g^2``."""
    grid, h = TimeGrid(STEPS, shift), 1 / STEPS
    base, tuned, x = torch.randn(3, STEPS, *CHUNK, dtype=DOUBLE)
    kls = path_kl_per_step((tuned - base).unsqueeze(1), grid)
    for i in range(STEPS):
        pull = x[i] / ((i + shift) * h)
        scale = (h * grid.noise_scale_squared(i)) ** 0.5
        first = torch.distributions.Normal(x[i] + h * (2 * tuned[i] - pull), scale)
        second = torch.distributions.Normal(x[i] + h * (2 * base[i] - pull), scale)
        expected = torch.distributions.kl_divergence(first, second).sum()
        assert float(kls[i]) == pytest.approx(float(expected), rel=1e-10)


def shifted_and_stretched(base: Velocity, gain: float, offset: float) -> Velocity:
    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return base(x, tau) + gain * x + offset * tau.view(-1, 1, 1)

    return velocity


def affine_path_kl(base: Velocity, tuned: Velocity, grid: TimeGrid) -> tuple[float, float]:
    """The exact path KL of two affine fields and the KL of their chains' ends.

    A gap that is affine in a Gaussian state has ``E gap^2 = mean^2 + slope^2``: the rows of the
    propagation give both, so the library's batch mean is fed each of them as its own row.
    """
    path = propagate(tuned, grid, base, "sde")
    steps = grid.num_flow_steps
    taus = [torch.full((1,), grid.tau(i), dtype=DOUBLE) for i in range(steps)]

    def gap(i: int, x: Tensor) -> Tensor:
        points = x.view(-1, 1, 1)
        tau = taus[i].expand(len(points))
        return (tuned(points, tau) - base(points, tau)).flatten()

    rows = []
    for i in range(steps):
        mean = gap(i, path.path_mean[i : i + 1])
        slope = gap(i, path.path_mean[i] + path.path_response[i]) - mean
        rows.append(torch.cat([mean, slope]))
    gaps = torch.stack(rows).view(steps, -1, 1, 1)
    kl = float(path_kl(gaps, grid)) * gaps.shape[1]
    reference = propagate(base, grid, base, "sde")
    ratio = path.variance / reference.variance
    shift = (path.mean - reference.mean) ** 2 / reference.variance
    return kl, 0.5 * (ratio - 1 - np.log(ratio) + shift)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_proposition_1_the_terminal_kl_is_at_most_the_path_kl(steps: int) -> None:
    base, grid = gaussian_field(0.5), TimeGrid(steps)
    for gain, offset in itertools.product([-0.5, 0.0, 0.4], [-1.0, 0.0, 0.3]):
        kl, terminal = affine_path_kl(base, shifted_and_stretched(base, gain, offset), grid)
        assert terminal <= kl + 1e-12
        if gain or offset:
            assert terminal > 0.05 * kl


def test_proposition_1_holds_on_enumerated_paths_of_a_discrete_chain() -> None:
    rng = np.random.default_rng(0)
    states, steps = 3, 4
    for _ in range(20):
        tuned, base = rng.dirichlet(np.ones(states), size=(2, steps, states))
        start = np.full(states, 1 / states)
        path, ends = 0.0, np.zeros((2, states))
        for way in itertools.product(range(states), repeat=steps + 1):
            moves = list(enumerate(itertools.pairwise(way)))
            p = start[way[0]] * np.prod([tuned[i, a, b] for i, (a, b) in moves])
            q = start[way[0]] * np.prod([base[i, a, b] for i, (a, b) in moves])
            path += p * np.log(p / q)
            ends[:, way[-1]] += p, q
        assert float((ends[0] * np.log(ends[0] / ends[1])).sum()) <= path


def tilted(base: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    weights = base * np.exp(beta * (q - q.max()))
    return weights / weights.sum()


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("error", [0.01, 0.1, 0.5])
def test_lemma_1_bounds_what_a_wrong_critic_does_to_the_optimum(beta: float, error: float) -> None:
    rng = np.random.default_rng(0)
    bound, worst = 0.5 * np.expm1(2 * beta * error), 0.0
    for _ in range(50):
        base, q = rng.dirichlet(np.ones(20)), rng.normal(size=20)
        # The worst critic errs by plus or minus the bound, whichever way.
        wrong = q + error * rng.choice([-1.0, 1.0], size=20)
        distance = 0.5 * np.abs(tilted(base, q, beta) - tilted(base, wrong, beta)).sum()
        worst = max(worst, distance)
        assert distance <= bound
    # The true supremum is tanh(beta * error / 2): a bound far below it would have been broken.
    assert worst > 0.5 * np.tanh(beta * error / 2)

"""Path-space KL: its value, and the two inequalities that make it worth bounding."""

import itertools

import numpy as np
import pytest
import torch
from closed_forms import moves_of
from flow_problems import (
    DOUBLE,
    NOISY_TO_THE_END,
    SCHEMES,
    AffineMap,
    gaussian_field,
    propagate,
)
from torch import Tensor

from vla_trqam.sde import Velocity
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid
from vla_trqam.trust_region import path_kl, path_kl_per_step

STEPS, BATCH, CHUNK = 8, 5, (2, 3)


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_a_constant_offset_costs_twice_h_over_noise_times_its_square(shift: float) -> None:
    offset = torch.randn(CHUNK, dtype=DOUBLE)
    gap = offset.expand(STEPS, BATCH, *CHUNK)
    grid, h = TimeGrid(STEPS, ShiftedEuler(shift)), 1 / STEPS
    square = sum(float(v) ** 2 for v in offset.flatten())
    per_step = [
        2 * h * square / (2 * (1 - i * h + shift * h) / (i * h + shift * h)) for i in range(STEPS)
    ]
    np.testing.assert_allclose(path_kl_per_step(gap, grid).numpy(), per_step, rtol=1e-12)
    assert float(path_kl(gap, grid)) == pytest.approx(sum(per_step), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kl_is_the_batch_mean_of_each_rows_kl(scheme: Scheme) -> None:
    gap, grid = torch.randn(STEPS, BATCH, *CHUNK, dtype=DOUBLE), TimeGrid(STEPS, scheme)
    rows = [float(path_kl(gap[:, b : b + 1], grid)) for b in range(BATCH)]
    assert float(path_kl(gap, grid)) == pytest.approx(np.mean(rows), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_fields_are_at_no_distance_and_the_kl_carries_no_gradient(scheme: Scheme) -> None:
    gap = torch.zeros(STEPS, BATCH, *CHUNK, requires_grad=True)
    kl = path_kl(gap, TimeGrid(STEPS, scheme))
    assert float(kl) == 0.0
    assert not kl.requires_grad


@pytest.mark.parametrize(
    ("scheme", "steps", "nats"),
    [(ShiftedEuler(), 10, 1.42), (Posterior(), 10, 2.42), (Posterior(), 4, 1.31)],
)
def test_what_a_constant_offset_of_one_costs(scheme: Scheme, steps: int, nats: float) -> None:
    gap = torch.ones(steps, 1, 1, 1, dtype=DOUBLE)
    assert float(path_kl(gap, TimeGrid(steps, scheme))) == pytest.approx(nats, abs=5e-3)


@pytest.mark.parametrize("scheme", [*SCHEMES, ShiftedEuler(0.5)])
def test_each_step_is_the_kl_of_the_two_gaussian_transitions(scheme: Scheme) -> None:
    """Both chains step to ``A x + B v`` with the same covariance V; without noise there is none."""
    grid, moves = TimeGrid(STEPS, scheme), moves_of(scheme, STEPS)
    base, tuned, x = torch.randn(3, STEPS, *CHUNK, dtype=DOUBLE)
    kls = path_kl_per_step((tuned - base).unsqueeze(1), grid)
    for i in range(STEPS):
        scale = moves.variance[i] ** 0.5
        if not scale:
            assert float(kls[i]) == 0.0
            continue
        means = (moves.keep[i] * x[i] + moves.gain[i] * field[i] for field in (tuned, base))
        first, second = (torch.distributions.Normal(mean, scale) for mean in means)
        expected = torch.distributions.kl_divergence(first, second).sum()
        assert float(kls[i]) == pytest.approx(float(expected), rel=1e-10)


def shifted_and_stretched(base: Velocity, gain: float, offset: float) -> Velocity:
    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return base(x, tau) + gain * x + offset * (0.5 + tau.view(-1, 1, 1))

    return velocity


def affine_path_kl(base: Velocity, tuned: Velocity, grid: TimeGrid) -> float:
    """The path KL of two affine fields by the library, without sampling.

    A gap that is affine in a Gaussian state has ``E gap^2 = mean^2 + slope^2``: the rows of the
    propagation give both, so the library's batch mean is fed each of them as its own row.
    """
    path = propagate(tuned, grid, base)
    rows = []
    for i, step in enumerate(grid.steps):

        def gap(x: Tensor, at: float = step.tau) -> Tensor:
            points = x.view(-1, 1, 1)
            tau = points.new_full((len(points),), at)
            return (tuned(points, tau) - base(points, tau)).flatten()

        mean = gap(path.path_mean[i : i + 1])
        slope = gap(path.path_mean[i] + path.path_response[i]) - mean
        rows.append(torch.cat([mean, slope]))
    gaps = torch.stack(rows).view(len(rows), -1, 1, 1)
    return float(path_kl(gaps, grid)) * gaps.shape[1]


def gaussian_kl(first: AffineMap, second: AffineMap, states: slice) -> float:
    """KL of the joint laws of some states of two chains, multivariate Gaussians."""
    shift = (first.path_mean - second.path_mean)[states].numpy()
    one, other = (m.path_response[states].numpy() for m in (first, second))
    precision = np.linalg.inv(other @ other.T)
    logs = [np.linalg.slogdet(r @ r.T).logabsdet for r in (other, one)]
    trace = np.trace(precision @ one @ one.T)
    return float(0.5 * (trace - len(shift) + shift @ precision @ shift + logs[0] - logs[1]))


# The chains that are sampled as their KL says; the posterior's last state follows from the one
# before, in both of them alike.
SAMPLED = [(Posterior(), slice(0, -1)), (NOISY_TO_THE_END, slice(0, None))]


@pytest.mark.parametrize(("scheme", "states"), SAMPLED)
@pytest.mark.parametrize("steps", [2, 4, 10])
def test_the_path_kl_is_that_of_the_joint_laws_of_the_two_sampled_chains(
    steps: int, scheme: Scheme, states: slice
) -> None:
    base, grid = gaussian_field(0.5), TimeGrid(steps, scheme)
    for gain, offset in itertools.product([-0.5, 0.0, 0.4], [-1.0, 0.3]):
        tuned = shifted_and_stretched(base, gain, offset)
        exact = gaussian_kl(propagate(tuned, grid, base), propagate(base, grid, base), states)
        assert exact > 1e-3
        assert affine_path_kl(base, tuned, grid) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("scheme", [scheme for scheme, _ in SAMPLED])
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_proposition_1_the_terminal_kl_is_at_most_the_path_kl(steps: int, scheme: Scheme) -> None:
    base, grid = gaussian_field(0.5), TimeGrid(steps, scheme)
    for gain, offset in itertools.product([-0.5, 0.0, 0.4], [-1.0, 0.0, 0.3]):
        tuned = shifted_and_stretched(base, gain, offset)
        chains = propagate(tuned, grid, base), propagate(base, grid, base)
        kl, terminal = affine_path_kl(base, tuned, grid), gaussian_kl(*chains, slice(-1, None))
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

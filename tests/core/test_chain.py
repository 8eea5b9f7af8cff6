"""The posterior chain against closed forms, and what the acting ODE makes of each chain's optimum.

A Gaussian base N(0, s^2) and ``Q(x) = x``: the tilt that theory asks for moves the mean by
``s^2 / lam``. The optimum of the discretised problem is known, and so is where the ODE that acts
arrives with it.
"""

import numpy as np
import pytest
import torch
from closed_forms import (
    adjoints,
    bayes_moves,
    gaussian,
    moves_of,
    ode_end,
    ode_variance,
    optimal_offsets,
)
from flow_problems import DOUBLE, SCHEMES, gaussian_field, gaussian_gain
from torch import Tensor

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, per_step

COUNTS = (2, 3, 4, 5, 10, 20, 50)
LAM = 0.7


# One step.


@pytest.mark.parametrize("steps", COUNTS)
def test_the_steps_are_the_paths_gaussian_posterior(steps: int) -> None:
    found, expected = TimeGrid(steps).steps, bayes_moves(steps)
    for name in ("tau", "keep", "gain", "variance"):
        numbers = [getattr(step, name) for step in found]
        np.testing.assert_allclose(numbers, getattr(expected, name), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", COUNTS)
def test_what_is_kept_of_the_state_has_a_short_form(steps: int) -> None:
    h = 1 / steps
    for step in TimeGrid(steps).steps:
        short = (step.tau + h**2 / (1 - step.tau)) / (step.tau + h)
        assert step.keep == pytest.approx(short, rel=1e-12)


def moments(steps: int, tau: float, samples: int = 400_000) -> tuple[np.ndarray, float]:
    """Regression of x_u on x_tau and x_1 in samples of the Markov process, and what is left."""
    rng, u = np.random.default_rng(0), tau + 1 / steps
    x_1, first, second = rng.normal(size=(3, samples))
    x_u = u * x_1 + (1 - u) * first
    c = tau / u
    x_tau = c * x_u + np.sqrt((1 - tau) ** 2 - (c * (1 - u)) ** 2) * second
    regressors = np.stack([x_tau, x_1], axis=1)
    slopes, rest, *_ = np.linalg.lstsq(regressors, x_u, rcond=None)
    return slopes, float(rest[0]) / samples


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_step_is_the_regression_of_samples_that_noise_was_added_to(index: int) -> None:
    """``x_1 = x + (1 - tau) v`` in what the samples say of x_u."""
    step = TimeGrid(4).steps[index]
    (of_x_tau, of_x_1), variance = moments(4, step.tau)
    assert step.keep == pytest.approx(of_x_tau + of_x_1, abs=5e-3)
    assert step.gain == pytest.approx(of_x_1 * (1 - step.tau), abs=5e-3)
    assert step.variance == pytest.approx(variance, rel=1e-2)


@pytest.mark.parametrize("steps", COUNTS)
def test_the_last_step_is_an_euler_step_without_noise_and_the_others_have_some(steps: int) -> None:
    *before, last = TimeGrid(steps).steps
    assert (last.keep, last.gain) == pytest.approx((1.0, 1 / steps), rel=1e-12)
    assert last.variance == 0.0
    assert not last.noisy
    assert last.sampled_with_base
    assert last.kl_weight == 0.0
    assert all(step.variance > 0.0 and step.noisy and not step.sampled_with_base for step in before)
    assert all(step.loss_variance == step.variance for step in before)


@pytest.mark.parametrize("weight", [1.0, 0.1, 5.0])
@pytest.mark.parametrize("steps", COUNTS)
def test_the_last_steps_weight_in_the_loss_is_in_units_of_the_step_befores(
    steps: int, weight: float
) -> None:
    """What a unit gap costs, adjoints at 0: ``lam B^2 / (h V)``, and the asked share of it last."""
    grid, moves = TimeGrid(steps, Posterior(weight)), bayes_moves(steps)
    costs = []
    for i in range(steps):
        gap = torch.zeros(steps, 1, 1, 1, dtype=DOUBLE)
        gap[i] = 1.0
        costs.append(float(adjoint_matching_loss(gap, torch.zeros_like(gap), grid, LAM)))
    closed = LAM * steps * moves.gain[:-1] ** 2 / moves.variance[:-1]
    np.testing.assert_allclose(costs[:-1], closed, rtol=1e-9)
    assert costs[-1] == pytest.approx(weight * closed[-1], rel=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kl_weight_is_the_gain_squared_over_twice_the_variance(scheme: Scheme) -> None:
    moves = moves_of(scheme, 6)
    for i, step in enumerate(TimeGrid(6, scheme).steps):
        noisy = moves.variance[i] > 0
        expected = moves.gain[i] ** 2 / (2 * moves.variance[i]) if noisy else 0.0
        assert step.kl_weight == pytest.approx(expected, rel=1e-12)


# What acts.


def acting_mean(grid: TimeGrid, variance: float) -> float:
    """Of the ODE at the optimum, by the library's adjoint and sampler, in units of s^2 / lam."""
    base = gaussian_field(variance)

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        tau = grid.steps[step].adjoint_tau
        assert tau is not None
        return gaussian_gain(tau, variance) * cotangent

    adjoint = lean_adjoint(-torch.ones(1, 1, 1, dtype=DOUBLE), pullback, grid)
    factors = [step.variance / (LAM * step.gain) for step in grid.steps]
    gap = -per_step(factors, adjoint) * adjoint

    def tuned(x: Tensor, tau: Tensor) -> Tensor:
        return base(x, tau) + gap[round(float(tau[0]) * grid.num_flow_steps)]

    end = sample_ode(tuned, torch.zeros(1, 1, 1, dtype=DOUBLE), grid)
    return float(end) * LAM / variance


# s^2, K; the acting mean with shifted Euler and with the posterior; the acting variance over s^2.
TABLE = [
    (1.0, 10, 0.8792, 0.7328, 0.7726),
    (1.0, 4, 0.6363, 0.4760, 0.5184),
    (0.1, 10, 1.1661, 0.6292, 0.6858),
    (0.1, 4, 1.4195, 0.3422, 0.3637),
    (0.01, 10, 1.9750, 0.3601, 0.3810),
    (0.01, 4, 11.5916, 0.0784, 0.0791),
]


@pytest.mark.parametrize(("variance", "steps", "shifted", "posterior", "ode"), TABLE)
def test_the_recorded_table_of_acting_means(
    variance: float, steps: int, shifted: float, posterior: float, ode: float
) -> None:
    for scheme, recorded in ((ShiftedEuler(), shifted), (Posterior(), posterior)):
        found = acting_mean(TimeGrid(steps, scheme), variance)
        assert found == pytest.approx(recorded, abs=6e-5)
    assert ode_variance(steps, gaussian(variance)) / variance == pytest.approx(ode, abs=6e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, ShiftedEuler(0.5, "same")])
@pytest.mark.parametrize("steps", range(2, 21))
def test_the_acting_mean_is_the_recursions(steps: int, scheme: Scheme) -> None:
    moves = moves_of(scheme, steps)
    for variance in (1.0, 0.1, 0.01):
        gain = gaussian(variance)
        end = ode_end(steps, gain, 0.0, optimal_offsets(moves, gain, LAM))
        found = acting_mean(TimeGrid(steps, scheme), variance)
        assert found == pytest.approx(end * LAM / variance, rel=1e-9)


@pytest.mark.parametrize("steps", range(2, 21))
def test_with_the_posterior_the_policy_that_acts_is_the_tilt_of_the_policy_that_acts(
    steps: int,
) -> None:
    """The tilt of N(0, S) by ``x / lam`` has mean ``S / lam``: here S is the acting variance."""
    for variance in (1.0, 0.1, 0.01):
        own = ode_variance(steps, gaussian(variance)) / variance
        assert acting_mean(TimeGrid(steps), variance) == pytest.approx(own, rel=0.1)


def test_shifted_euler_overshoots_the_more_the_narrower_the_actions() -> None:
    overshoot = [
        acting_mean(TimeGrid(4, ShiftedEuler()), variance)
        / (ode_variance(4, gaussian(variance)) / variance)
        for variance in (1.0, 0.1, 0.01)
    ]
    assert overshoot == sorted(overshoot)
    assert overshoot[0] == pytest.approx(1.23, abs=5e-3)
    assert overshoot[2] > 100


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_acting_mean_tends_to_the_theorys(scheme: Scheme) -> None:
    gaps = [abs(acting_mean(TimeGrid(steps, scheme), 0.5) - 1.0) for steps in (40, 160, 640)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.01


def test_the_posteriors_last_step_has_no_tilt_of_its_own() -> None:
    """All of the acting mean comes from the steps with noise."""
    gain, moves = gaussian(0.1), bayes_moves(5)
    offsets = optimal_offsets(moves, gain, LAM)
    assert offsets[-1] == 0.0
    assert (offsets[:-1] > 0).all()
    assert adjoints(moves, gain)[-1] == -1.0

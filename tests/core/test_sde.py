import numpy as np
import pytest
import torch
from closed_forms import chain_variance, gaussian, moves_of
from flow_problems import (
    DOUBLE,
    NOISY_TO_THE_END,
    SCHEMES,
    FunctionPolicy,
    gaussian_field,
    ode_variance,
    propagate,
)
from torch import Tensor

from vla_trqam.sde import sample_memoryless_sde, sample_ode, sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, full_tau

STEPS = (10, 20, 50, 200)
NOISELESS = (1.2262, 1.1336, 1.0590, 1.0155)
NOISY = (1.2608, 1.1430, 1.0605, 1.0156)
ODE = (0.7726, 0.8793, 0.9499, 0.9872)


@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, NOISELESS, strict=True)))
def test_terminal_variance_with_a_noiseless_last_step(steps: int, variance: float) -> None:
    field, grid = gaussian_field(1.0), TimeGrid(steps, ShiftedEuler())
    assert propagate(field, grid, field).variance == pytest.approx(variance, abs=5e-5)


@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, NOISY, strict=True)))
def test_terminal_variance_with_noise_in_every_step(steps: int, variance: float) -> None:
    field, grid = gaussian_field(1.0), TimeGrid(steps, NOISY_TO_THE_END)
    assert propagate(field, grid, field).variance == pytest.approx(variance, abs=5e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, ODE, strict=True)))
def test_terminal_variance_of_the_ode_whatever_the_chain(
    steps: int, variance: float, scheme: Scheme
) -> None:
    found = ode_variance(gaussian_field(1.0), TimeGrid(steps, scheme))
    assert found == pytest.approx(variance, abs=5e-5)


# At K = 10, in units of the actions' variance: shifted Euler's chain, the posterior's, the ODE.
WIDTHS = [(1.0, 1.23, 0.65, 0.77), (0.05, 1.48, 0.49, 0.62), (0.01, 1.66, 0.33, 0.38)]


@pytest.mark.parametrize(("variance", "shifted", "posterior", "ode"), WIDTHS)
def test_the_posterior_chain_is_about_as_wide_as_the_ode_where_shifted_euler_is_much_wider(
    variance: float, shifted: float, posterior: float, ode: float
) -> None:
    field = gaussian_field(variance)
    for scheme, width in ((ShiftedEuler(), shifted), (Posterior(), posterior)):
        found = propagate(field, TimeGrid(10, scheme), field).variance / variance
        assert found == pytest.approx(width, abs=5e-3)
    assert ode_variance(field, TimeGrid(10)) / variance == pytest.approx(ode, abs=5e-3)


ALL = [
    *(ShiftedEuler(shift, final_step="sde") for shift in (1.0, 0.5, 0.1)),
    *(ShiftedEuler(shift) for shift in (1.0, 0.5, 0.1)),
    Posterior(),
]


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("variance", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("steps", [2, 4, 10])
def test_variance_follows_its_own_recursion(steps: int, variance: float, scheme: Scheme) -> None:
    field = gaussian_field(variance)
    path = propagate(field, TimeGrid(steps, scheme), field)
    expected = chain_variance(moves_of(scheme, steps), gaussian(variance))
    assert path.variance == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variance", [1.0, 0.05])
def test_chain_and_ode_tend_to_the_data_variance(variance: float, scheme: Scheme) -> None:
    field = gaussian_field(variance)
    grids = [TimeGrid(steps, scheme) for steps in STEPS]
    gaps = [
        [
            abs(propagate(field, grid, field).variance / variance - 1),
            abs(ode_variance(field, grid) / variance - 1),
        ]
        for grid in grids
    ]
    assert np.all(np.diff(gaps, axis=0) < 0)
    assert max(gaps[-1]) < 0.06


def nonlinear(x: Tensor, tau: Tensor) -> Tensor:
    return torch.sin(2 * x) * (1 + tau.view(-1, 1, 1)) - 0.3 * x.roll(1, dims=2)


def other(x: Tensor, tau: Tensor) -> Tensor:
    return torch.cos(x) - tau.view(-1, 1, 1) * x


@pytest.mark.parametrize("scheme", ALL)
def test_the_path_equals_the_naive_loop(scheme: Scheme) -> None:
    rng, moves = np.random.default_rng(0), moves_of(scheme, 7)
    x_0, noise = rng.normal(size=(5, 2, 3)), rng.normal(size=(7, 5, 2, 3))
    expected, x = [x_0], x_0
    for i in range(7):
        here, tau = torch.from_numpy(x), torch.full((5,), i / 7, dtype=DOUBLE)
        if i == 6 and moves.noiseless_end:
            x = x + other(here, tau).numpy() / 7
        else:
            x = moves.keep[i] * x + moves.gain[i] * nonlinear(here, tau).numpy()
            x = x + np.sqrt(moves.variance[i]) * noise[i]
        expected.append(x)
    path = sample_memoryless_sde(
        nonlinear,
        torch.from_numpy(x_0),
        torch.from_numpy(noise),
        TimeGrid(7, scheme),
        base_velocity=other,
    )
    np.testing.assert_allclose(path.x.numpy(), np.stack(expected), rtol=1e-12, atol=1e-12)
    assert path.states.shape == (7, 5, 2, 3)
    assert torch.equal(path.x_1, path.x[-1])


def test_the_ode_equals_the_naive_loop() -> None:
    x_0 = torch.randn(5, 2, 3, dtype=DOUBLE)
    x = x_0
    for i in range(7):
        x = x + nonlinear(x, torch.full((5,), i / 7, dtype=DOUBLE)) / 7
    torch.testing.assert_close(sample_ode(nonlinear, x_0, TimeGrid(7)), x, rtol=1e-13, atol=1e-13)


def test_sampling_leaves_its_inputs_alone_and_carries_no_gradient() -> None:
    weight = torch.ones((), requires_grad=True)
    x_0, noise = torch.randn(4, 2, 3), torch.randn(5, 4, 2, 3)
    copies = x_0.clone(), noise.clone()
    path = sample_memoryless_sde(
        lambda x, tau: weight * x, x_0, noise, TimeGrid(5), base_velocity=other
    )
    assert not path.x.requires_grad
    assert torch.equal(x_0, copies[0])
    assert torch.equal(noise, copies[1])


@pytest.mark.parametrize("scheme", [*SCHEMES, NOISY_TO_THE_END])
def test_path_and_next_action_together_are_what_each_is_alone(scheme: Scheme) -> None:
    x_0, next_x_0 = torch.randn(2, 5, 2, 3)
    noise, grid = torch.randn(7, 5, 2, 3), TimeGrid(7, scheme)
    policy = FunctionPolicy(nonlinear, other, (2, 3), 7)
    path, action = sample_path_and_next_action(
        policy.path_fields(None, None), x_0, noise, next_x_0, grid
    )
    alone = sample_memoryless_sde(nonlinear, x_0, noise, grid, base_velocity=other)
    assert torch.equal(path.x, alone.x)
    assert torch.equal(action, sample_ode(nonlinear, next_x_0, grid))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fields_recorded_along_a_path_are_the_fields_at_its_states(scheme: Scheme) -> None:
    """The last state included: the loss and the KL need the tuned field there too."""
    grid, policy = TimeGrid(7, scheme), FunctionPolicy(nonlinear, other, (2, 3), 7)
    fields = policy.path_fields(None, None)
    noise = torch.randn(7, 5, 2, 3)
    path, _ = sample_path_and_next_action(fields, noise[0], noise, noise[1], grid)
    taus = [full_tau(i / 7, x) for i, x in enumerate(path.states)]
    tuned = [nonlinear(x, tau) for x, tau in zip(path.states, taus, strict=True)]
    base = [other(x, tau) for x, tau in zip(path.states, taus, strict=True)]
    assert torch.equal(fields.tuned(), torch.stack(tuned))
    assert torch.equal(fields.base(), torch.stack(base))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_noiseless_last_step_needs_the_base(scheme: Scheme) -> None:
    x_0, noise = torch.zeros(1, 1, 1), torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="needs base_velocity"):
        sample_memoryless_sde(other, x_0, noise, TimeGrid(2, scheme))
    sample_memoryless_sde(other, x_0, noise, TimeGrid(2, NOISY_TO_THE_END))

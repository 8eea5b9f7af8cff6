import numpy as np
import pytest
import torch
from flow_problems import (
    DOUBLE,
    FunctionPolicy,
    gaussian_field,
    gaussian_gain,
    ode_variance,
    propagate,
)
from torch import Tensor

from vla_trqam.sde import (
    FinalStep,
    sample_memoryless_sde,
    sample_ode,
    sample_path_and_next_action,
)
from vla_trqam.time_grid import TimeGrid

STEPS = (10, 20, 50, 200)
NOISELESS = (1.2262, 1.1336, 1.0590, 1.0155)
NOISY = (1.2608, 1.1430, 1.0605, 1.0156)
ODE = (0.7726, 0.8793, 0.9499, 0.9872)


@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, NOISELESS, strict=True)))
def test_terminal_variance_with_a_noiseless_last_step(steps: int, variance: float) -> None:
    field = gaussian_field(1.0)
    assert propagate(field, TimeGrid(steps), field).variance == pytest.approx(variance, abs=5e-5)


@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, NOISY, strict=True)))
def test_terminal_variance_with_noise_in_every_step(steps: int, variance: float) -> None:
    field = gaussian_field(1.0)
    path = propagate(field, TimeGrid(steps), field, "sde")
    assert path.variance == pytest.approx(variance, abs=5e-5)


@pytest.mark.parametrize(("steps", "variance"), list(zip(STEPS, ODE, strict=True)))
def test_terminal_variance_of_the_ode(steps: int, variance: float) -> None:
    assert ode_variance(gaussian_field(1.0), TimeGrid(steps)) == pytest.approx(variance, abs=5e-5)


def test_narrow_actions_are_much_wider_under_the_sde_than_under_the_ode() -> None:
    field, grid = gaussian_field(0.05), TimeGrid(10)
    assert propagate(field, grid, field).variance / 0.05 == pytest.approx(1.48, abs=5e-3)
    assert ode_variance(field, grid) / 0.05 == pytest.approx(0.62, abs=5e-3)


@pytest.mark.parametrize("shift", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("variance", [1.0, 0.3])
@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
def test_variance_follows_its_own_recursion(
    variance: float, shift: float, final_step: FinalStep
) -> None:
    grid, h, expected = TimeGrid(10, shift), 0.1, 1.0
    for i in range(10):
        gain = gaussian_gain(i * h, variance)
        shifted = (i + shift) * h
        if i == 9 and final_step == "noiseless_base":
            expected *= (1 + h * gain) ** 2
            continue
        noise = h * 2 * (1 - i * h + shift * h) / shifted
        expected = (1 + h * (2 * gain - 1 / shifted)) ** 2 * expected + noise
    field = gaussian_field(variance)
    path = propagate(field, grid, field, final_step)
    assert path.variance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variance", [1.0, 0.05])
def test_sde_and_ode_tend_to_the_data_variance(variance: float) -> None:
    field = gaussian_field(variance)
    gaps = [
        [
            abs(propagate(field, TimeGrid(k), field).variance / variance - 1),
            abs(ode_variance(field, TimeGrid(k)) / variance - 1),
        ]
        for k in STEPS
    ]
    assert np.all(np.diff(gaps, axis=0) < 0)
    assert max(gaps[-1]) < 0.06


def nonlinear(x: Tensor, tau: Tensor) -> Tensor:
    return torch.sin(2 * x) * (1 + tau.view(-1, 1, 1)) - 0.3 * x.roll(1, dims=2)


def other(x: Tensor, tau: Tensor) -> Tensor:
    return torch.cos(x) - tau.view(-1, 1, 1) * x


@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_path_equals_the_naive_loop(final_step: FinalStep, shift: float) -> None:
    rng = np.random.default_rng(0)
    x_0, noise = rng.normal(size=(5, 2, 3)), rng.normal(size=(7, 5, 2, 3))
    expected, x, h = [x_0], x_0, 1 / 7
    for i in range(7):
        tau, d = torch.full((5,), i * h, dtype=DOUBLE), shift * h
        g = np.sqrt(2 * (1 - i * h + d) / (i * h + d))
        if i == 6 and final_step == "noiseless_base":
            x = x + h * other(torch.from_numpy(x), tau).numpy()
        else:
            v = nonlinear(torch.from_numpy(x), tau).numpy()
            x = x + h * (2 * v - x / (i * h + d)) + np.sqrt(h) * g * noise[i]
        expected.append(x)
    path = sample_memoryless_sde(
        nonlinear,
        torch.from_numpy(x_0),
        torch.from_numpy(noise),
        TimeGrid(7, shift),
        base_velocity=other,
        final_step=final_step,
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


@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
def test_path_and_next_action_together_are_what_each_is_alone(final_step: FinalStep) -> None:
    x_0, next_x_0 = torch.randn(2, 5, 2, 3)
    noise, grid = torch.randn(7, 5, 2, 3), TimeGrid(7)
    policy = FunctionPolicy(nonlinear, other, (2, 3), 7)
    path, action = sample_path_and_next_action(
        policy.path_fields(None, None), x_0, noise, next_x_0, grid, final_step=final_step
    )
    alone = sample_memoryless_sde(
        nonlinear, x_0, noise, grid, base_velocity=other, final_step=final_step
    )
    assert torch.equal(path.x, alone.x)
    assert torch.equal(action, sample_ode(nonlinear, next_x_0, grid))


def test_the_fields_recorded_along_a_path_are_the_fields_at_its_states() -> None:
    """The last state included: the loss and the KL need the tuned field there too."""
    grid, policy = TimeGrid(7), FunctionPolicy(nonlinear, other, (2, 3), 7)
    fields = policy.path_fields(None, None)
    noise = torch.randn(7, 5, 2, 3)
    path, _ = sample_path_and_next_action(fields, noise[0], noise, noise[1], grid)
    taus = [torch.full((5,), i / 7) for i in range(7)]
    tuned = [nonlinear(x, tau) for x, tau in zip(path.states, taus, strict=True)]
    base = [other(x, tau) for x, tau in zip(path.states, taus, strict=True)]
    assert torch.equal(fields.tuned(), torch.stack(tuned))
    assert torch.equal(fields.base(), torch.stack(base))


def test_a_noiseless_last_step_needs_the_base() -> None:
    with pytest.raises(ValueError, match="needs base_velocity"):
        sample_memoryless_sde(other, torch.zeros(1, 1, 1), torch.zeros(2, 1, 1, 1), TimeGrid(2))

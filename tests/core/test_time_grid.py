import pytest
import torch

from vla_trqam.errors import UserError
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, full_tau, per_step


def noise_scales_squared(steps: int, shift: float) -> list[float]:
    grid = TimeGrid(steps, ShiftedEuler(shift))
    return [step.noise_scale_squared for step in grid.steps]


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_noise_scale_with_a_whole_step_of_shift_is_the_published_one(steps: int) -> None:
    h, scales = 1.0 / steps, noise_scales_squared(steps, 1.0)
    for i, step in enumerate(TimeGrid(steps, ShiftedEuler()).steps):
        t = i / steps
        assert step.tau == t
        assert scales[i] == pytest.approx(2 * (1 - t + h) / (t + h), rel=1e-14)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_without_shift_the_noise_scale_tends_to_the_continuous_one(step: int) -> None:
    tau = step / 10
    memoryless = 2 * (1 - tau) / tau
    errors = [abs(noise_scales_squared(10, d)[step] - memoryless) for d in (1, 0.1, 1e-6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("scheme", [ShiftedEuler(0.01), Posterior(0.01)])
def test_the_losss_noise_scale_is_finite_at_noise_and_positive_at_action(scheme: Scheme) -> None:
    scales = [step.noise_scale_squared for step in TimeGrid(10, scheme).steps]
    assert all(0.0 < scale < float("inf") for scale in scales)


@pytest.mark.parametrize("scheme", [ShiftedEuler(0.5), Posterior()])
def test_the_steps_stand_at_the_grids_times(scheme: Scheme) -> None:
    assert [step.tau for step in TimeGrid(4, scheme).steps] == [0.0, 0.25, 0.5, 0.75]


def test_shifted_eulers_drift_is_that_of_the_shifted_time() -> None:
    steps = TimeGrid(4, ShiftedEuler(0.5)).steps
    shifted = [0.125, 0.375, 0.625, 0.875]
    assert [step.keep for step in steps] == [1.0 - 0.25 / tau for tau in shifted]
    assert [step.gain for step in steps] == [0.5] * 4


def test_the_posterior_chain_is_the_default() -> None:
    assert TimeGrid(4) == TimeGrid(4, Posterior())
    assert TimeGrid(4) != TimeGrid(4, ShiftedEuler())


def test_per_step_weights_the_first_axis() -> None:
    path = torch.ones(3, 2, 4, 5, dtype=torch.float64)
    weights = per_step([1.0, 2.0, 1 / 3], path)
    assert weights.dtype == torch.float64
    assert (weights * path)[:, 1, 3, 4].tolist() == [1.0, 2.0, 1 / 3]
    assert per_step([1.0, 2.0, 1 / 3], path.float()).dtype == torch.float32


def test_full_tau_is_one_number_a_sample() -> None:
    tau = full_tau(0.3, torch.zeros(5, 2, 3, dtype=torch.float64))
    assert tau.shape == (5,)
    assert tau.dtype == torch.float64


@pytest.mark.parametrize("scheme", [Posterior(), ShiftedEuler()])
@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_without_steps_is_refused(steps: int, scheme: Scheme) -> None:
    with pytest.raises(UserError, match=f"num_flow_steps is {steps}; it must be at least 1"):
        TimeGrid(steps, scheme)


@pytest.mark.parametrize("shift", [0.0, -0.5, 1.5, float("nan")])
def test_a_shift_without_meaning_is_refused(shift: float) -> None:
    with pytest.raises(UserError, match=rf"time_shift is {shift}; it must be in \(0, 1\]"):
        ShiftedEuler(shift)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_last_step_without_a_weight_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=f"last_step_weight is {weight}; it must be positive"):
        Posterior(weight)


def test_the_posterior_chain_of_one_step_is_refused_and_shifted_eulers_is_not() -> None:
    with pytest.raises(UserError) as error:
        _ = TimeGrid(1).steps
    assert str(error.value) == (
        "num_flow_steps is 1: the posterior chain's last step has no noise, and with one step "
        "there is nothing to tune; take at least 2, or the shifted_euler scheme"
    )
    assert len(TimeGrid(1, ShiftedEuler()).steps) == 1

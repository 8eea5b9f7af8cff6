import pytest
import torch

from vla_trqam.errors import UserError
from vla_trqam.time_grid import TimeGrid, full_tau, per_step


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_noise_scale_with_a_whole_step_of_shift_is_the_published_one(steps: int) -> None:
    grid, h = TimeGrid(steps), 1.0 / steps
    for i in range(steps):
        t = i / steps
        assert grid.tau(i) == t
        assert grid.noise_scale_squared(i) == pytest.approx(2 * (1 - t + h) / (t + h), rel=1e-14)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_without_shift_the_noise_scale_tends_to_the_continuous_one(step: int) -> None:
    tau = step / 10
    memoryless = 2 * (1 - tau) / tau
    errors = [abs(TimeGrid(10, d).noise_scale_squared(step) - memoryless) for d in (1, 0.1, 1e-6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_the_noise_scale_is_finite_at_noise_and_positive_at_action() -> None:
    scales = TimeGrid(10, 0.01).noise_scales_squared(torch.zeros(()))
    assert bool(torch.isfinite(scales).all())
    assert float(scales.min()) > 0


def test_tensors_keep_dtype_and_order() -> None:
    grid = TimeGrid(4, 0.5)
    like = torch.zeros(2, dtype=torch.float64)
    assert grid.taus(like).dtype == torch.float64
    assert grid.taus(like).tolist() == [0.0, 0.25, 0.5, 0.75]
    expected = [grid.noise_scale_squared(i) for i in range(4)]
    assert grid.noise_scales_squared(like).tolist() == expected
    assert [grid.shifted_tau(i) for i in range(4)] == [0.125, 0.375, 0.625, 0.875]


def test_per_step_weights_the_first_axis() -> None:
    path = torch.ones(3, 2, 4, 5)
    weighted = per_step(torch.tensor([1.0, 2.0, 3.0]), path) * path
    assert weighted[:, 1, 3, 4].tolist() == [1.0, 2.0, 3.0]


def test_full_tau_is_one_number_a_sample() -> None:
    tau = full_tau(0.3, torch.zeros(5, 2, 3, dtype=torch.float64))
    assert tau.shape == (5,)
    assert tau.dtype == torch.float64


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (10, 0.0), (10, 1.5)])
def test_a_grid_without_meaning_is_refused(steps: int, shift: float) -> None:
    with pytest.raises(UserError, match=r"(num_flow_steps|time_shift) is"):
        TimeGrid(steps, shift)

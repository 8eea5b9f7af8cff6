import numpy as np
import pytest
import torch
from closed_forms import bayes_moves, moves_of
from flow_problems import DOUBLE, SCHEMES
from torch import Tensor

from vla_trqam.losses import (
    adjoint_matching_loss,
    flow_matching_loss,
    flow_matching_target,
    pessimistic_value,
    td_loss,
    td_target,
)
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, per_step

STEPS, BATCH, CHUNK = 6, 5, (2, 3)


@pytest.fixture
def gap_and_adjoint() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (STEPS, BATCH, *CHUNK)
    return torch.randn(shape, dtype=DOUBLE), torch.randn(shape, dtype=DOUBLE)


def naive_loss(gap: Tensor, adjoint: Tensor, lam: float, shift: float) -> float:
    total, h = 0.0, 1 / STEPS
    for i in range(STEPS):
        g_squared = 2 * (1 - i * h + shift * h) / (i * h + shift * h)
        sigma = (g_squared / lam) ** 0.5
        for b in range(BATCH):
            residual = 2 * gap[i, b] / sigma + sigma * adjoint[i, b]
            total += float((residual**2).sum()) / BATCH
    return total


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("lam", [0.1, 1.0, 7.0])
def test_adjoint_matching_equals_the_naive_loop(
    lam: float, shift: float, gap_and_adjoint: tuple[Tensor, Tensor]
) -> None:
    gap, adjoint = gap_and_adjoint
    loss = adjoint_matching_loss(gap, adjoint, TimeGrid(STEPS, ShiftedEuler(shift)), lam)
    assert float(loss) == pytest.approx(naive_loss(gap, adjoint, lam, shift), rel=1e-12)


def bayes_loss(gap: Tensor, adjoint: Tensor, lam: float, last_step_weight: float) -> float:
    """``lam / (h V) ||B gap + V / lam a||^2``; at the last step the fields are held together."""
    total, h, moves = 0.0, 1 / STEPS, bayes_moves(STEPS)
    for i in range(STEPS - 1):
        residual = moves.gain[i] * gap[i] + moves.variance[i] / lam * adjoint[i]
        total += lam / (h * moves.variance[i]) * float((residual**2).sum()) / BATCH
    weight = lam * moves.gain[-2] ** 2 / (h * moves.variance[-2])
    return total + last_step_weight * weight * float((gap[-1] ** 2).sum()) / BATCH


@pytest.mark.parametrize("last_step_weight", [1.0, 0.1])
@pytest.mark.parametrize("lam", [0.1, 1.0, 7.0])
def test_the_posterior_chains_loss_equals_the_naive_loop(
    lam: float, last_step_weight: float, gap_and_adjoint: tuple[Tensor, Tensor]
) -> None:
    gap, adjoint = gap_and_adjoint
    loss = adjoint_matching_loss(gap, adjoint, TimeGrid(STEPS, Posterior(last_step_weight)), lam)
    expected = bayes_loss(gap, adjoint, lam, last_step_weight)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("lam", [0.03, 0.7, 1.0, 3.0, 300.0])
def test_trqams_loss_is_lambda_times_qams_at_beta_one_over_lambda(
    lam: float, scheme: Scheme, gap_and_adjoint: tuple[Tensor, Tensor]
) -> None:
    gap, adjoint = gap_and_adjoint
    grid = TimeGrid(STEPS, scheme)
    trqam = adjoint_matching_loss(gap, adjoint, grid, lam)
    qam = adjoint_matching_loss(gap, adjoint / lam, grid, 1.0)
    assert float(trqam) == pytest.approx(lam * float(qam), rel=1e-13)


@pytest.mark.parametrize("scheme", [*SCHEMES, ShiftedEuler(0.5), Posterior(0.1)])
@pytest.mark.parametrize("lam", [0.1, 1.0, 7.0])
def test_the_minimiser_is_minus_the_adjoint_times_the_variance_over_lambda_and_the_gain(
    lam: float, scheme: Scheme, gap_and_adjoint: tuple[Tensor, Tensor]
) -> None:
    """In the authors' scheme the factor is half the squared noise scale; without noise it is 0."""
    _, adjoint = gap_and_adjoint
    grid, moves = TimeGrid(STEPS, scheme), moves_of(scheme, STEPS)
    best = -per_step(list(moves.variance / (lam * moves.gain)), adjoint) * adjoint
    assert bool((best[-1] == 0).all()) == isinstance(scheme, Posterior)
    best.requires_grad_(True)
    loss = adjoint_matching_loss(best, adjoint, grid, lam)
    loss.backward()
    assert best.grad is not None
    assert float(best.grad.abs().max()) < 1e-13
    assert loss.item() < 1e-25
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = 1e-3 * torch.randn(best.shape, dtype=DOUBLE, generator=generator)
        assert float(adjoint_matching_loss(best.detach() + step, adjoint, grid, lam)) > 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_adjoint_is_a_target_and_gets_no_gradient(
    scheme: Scheme, gap_and_adjoint: tuple[Tensor, Tensor]
) -> None:
    gap, adjoint = (t.requires_grad_(True) for t in gap_and_adjoint)
    adjoint_matching_loss(gap, adjoint, TimeGrid(STEPS, scheme), 2.0).backward()
    assert gap.grad is not None
    assert adjoint.grad is None


def test_flow_matching_interpolates_from_noise_to_action_at_each_samples_time() -> None:
    action, x_0 = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    tau = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x, velocity = flow_matching_target(action, x_0, tau)
    assert torch.equal(x[0], x_0[0])
    assert torch.equal(x[3], action[3])
    torch.testing.assert_close(x[1], 0.75 * x_0[1] + 0.25 * action[1])
    assert torch.equal(velocity, action - x_0)


def test_flow_matching_loss_leaves_out_steps_not_taken_and_divides_by_all() -> None:
    predicted, target = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    target[1, 2] = 1e6
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert float(flow_matching_loss(predicted, target, valid)) == pytest.approx(5 / 6)
    target.requires_grad_(True)
    predicted.requires_grad_(True)
    flow_matching_loss(predicted, target, valid).backward()
    assert target.grad is None
    assert predicted.grad is not None
    assert predicted.grad[1, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pessimism", [0.0, 0.5, 2.0])
def test_the_pessimistic_value_is_mean_minus_population_deviations(pessimism: float) -> None:
    q = np.random.default_rng(0).normal(size=(4, 7))
    expected = q.mean(axis=0) - pessimism * q.std(axis=0)
    actual = pessimistic_value(torch.from_numpy(q), pessimism)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_a_terminated_chunk_does_not_bootstrap_and_a_truncated_one_does() -> None:
    # Rows: under way, terminated, truncated (not terminated), terminated beside a wild next value.
    target = td_target(
        chunk_return=torch.tensor([1.0, 1.0, 1.0, -2.0]),
        discount=torch.tensor([0.9, 0.9, 0.5, 0.9]),
        terminated=torch.tensor([False, True, False, True]),
        next_value=torch.tensor([10.0, 10.0, 10.0, 1e30]),
    )
    assert target.tolist() == pytest.approx([10.0, 1.0, 6.0, -2.0])


def test_td_loss_is_the_weighted_mean_over_ensemble_and_batch() -> None:
    q = torch.tensor([[1.0, 5.0, 2.0], [0.0, 5.0, 2.0]], requires_grad=True)
    target = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    loss = td_loss(q, target, torch.tensor([1.0, 0.0, 1.0]))
    assert loss.item() == pytest.approx((1 + 1 + 0 + 1) / 6)
    loss.backward()
    assert target.grad is None
    assert q.grad is not None
    assert q.grad[:, 1].tolist() == [0.0, 0.0]

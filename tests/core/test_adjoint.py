import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from closed_forms import Moves, moves_of
from flow_problems import DOUBLE, SCHEMES, autograd_pullback
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.adjoint import lean_adjoint, scalar_adjoint
from vla_trqam.sde import sample_path_and_next_action
from vla_trqam.time_grid import (
    AdjointTime,
    FinalStep,
    Posterior,
    Scheme,
    ShiftedEuler,
    TimeGrid,
    full_tau,
)

BATCH, CHUNK, STEPS = 4, (2, 3), 6


def terminal_q(x: Tensor) -> Tensor:
    """Any smooth Q over chunks, (B, H, A) -> (B,)."""
    return torch.sin(1.3 * x).flatten(1).sum(1) + 0.2 * x.flatten(1).prod(1)


def policy_of(layer_norm: bool) -> MLPFlowPolicy:
    torch.manual_seed(1)
    config = MLPFlowConfig(5, CHUNK[1], CHUNK[0], (16, 24), layer_norm, STEPS)
    policy = MLPFlowPolicy(config).double()
    for parameter in policy.tuned.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


def base_chain_gradients(
    field: Callable[[Tensor, Tensor], Tensor], states: Tensor, moves: Moves
) -> Tensor:
    """``d(-Q(X_K)) / dX_i`` by autograd through the base's chain, its noise frozen.

    The noise is what makes the base's chain pass through the recorded states, whoever sampled them.
    """
    x = states[0].clone().requires_grad_(True)
    visited = [x]
    for i, tau in enumerate(moves.adjoint_tau):
        step = moves.keep[i] * x + moves.gain[i] * field(x, full_tau(tau, x))
        x = step + (states[i + 1] - step).detach()
        visited.append(x)
    found = torch.stack(torch.autograd.grad(-terminal_q(x).sum(), visited))
    return found[1:] if moves.pairs_with_next else found[:-1]


def assert_adjoint_is_autograds(scheme: Scheme, layer_norm: bool) -> None:
    policy, grid = policy_of(layer_norm), TimeGrid(STEPS, scheme)
    context = policy.encode(torch.randn(BATCH, 5, dtype=DOUBLE))
    noise = torch.randn(STEPS, BATCH, *CHUNK, dtype=DOUBLE)
    x_0, next_x_0 = torch.randn(2, BATCH, *CHUNK, dtype=DOUBLE)
    fields = policy.path_fields(context, context)
    path, _ = sample_path_and_next_action(fields, x_0, noise, next_x_0, grid)
    x_1 = path.x_1.clone().requires_grad_(True)
    (terminal,) = torch.autograd.grad(-terminal_q(x_1).sum(), x_1)
    adjoint = lean_adjoint(terminal, fields.base_pullback, grid)

    expected = base_chain_gradients(
        lambda x, tau: policy.base_velocity(x, tau, context), path.x, moves_of(scheme, STEPS)
    )
    assert adjoint.shape == (STEPS, BATCH, *CHUNK)
    torch.testing.assert_close(adjoint, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("adjoint_time", ["next", "same"])
@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
def test_the_lean_adjoint_is_autograd_through_the_base_chain_with_frozen_noise(
    final_step: FinalStep, adjoint_time: AdjointTime, shift: float, layer_norm: bool
) -> None:
    assert_adjoint_is_autograds(ShiftedEuler(shift, adjoint_time, final_step), layer_norm)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_posterior_chains_adjoint_is_autograds_at_the_state_behind_each_step(
    layer_norm: bool,
) -> None:
    assert_adjoint_is_autograds(Posterior(), layer_norm)


def test_next_and_same_differ_by_one_step_of_time() -> None:
    asked: dict[AdjointTime, list[float]] = {
        "same": [0.0, 0.25, 0.5, 0.75],
        "next": [0.25, 0.5, 0.75, 1.0],
    }
    for when, taus in asked.items():
        steps = TimeGrid(4, ShiftedEuler(adjoint_time=when)).steps
        assert [step.adjoint_tau for step in steps] == taus


def test_the_posterior_chain_asks_where_it_is_and_for_no_adjoint_that_no_step_takes() -> None:
    assert [step.adjoint_tau for step in TimeGrid(4).steps] == [None, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("scheme", [*SCHEMES, ShiftedEuler(0.5)])
def test_the_adjoint_of_a_zero_field_shrinks_by_the_memoryless_drift_alone(scheme: Scheme) -> None:
    grid, moves = TimeGrid(STEPS, scheme), moves_of(scheme, STEPS)
    terminal = torch.randn(BATCH, *CHUNK, dtype=DOUBLE)
    adjoint = lean_adjoint(terminal, lambda i, a: torch.zeros_like(a), grid)
    factors = np.append(np.cumprod(moves.keep[::-1])[::-1], 1.0)
    for i, factor in enumerate(factors[1:] if moves.pairs_with_next else factors[:-1]):
        torch.testing.assert_close(adjoint[i], factor * terminal, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("scheme", "expected"), [(ShiftedEuler(), [4, 3, 2, 1, 0]), (Posterior(), [4, 3, 2, 1])]
)
def test_the_pullback_gets_every_step_once_from_last_to_first(
    scheme: Scheme, expected: list[int]
) -> None:
    asked: list[int] = []

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        asked.append(step)
        return torch.zeros_like(cotangent)

    grid = TimeGrid(5, scheme)
    lean_adjoint(torch.ones(1, 1, 1), pullback, grid)
    assert asked == expected
    assert {i for i, step in enumerate(grid.steps) if step.adjoint_tau is not None} == set(asked)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_adjoint_is_linear_in_its_terminal_value(scheme: Scheme) -> None:
    grid = TimeGrid(5, scheme)
    states = torch.randn(5, BATCH, *CHUNK, dtype=DOUBLE)
    taus = torch.tensor([grid.tau(i) for i in range(5)], dtype=DOUBLE)
    pullback = autograd_pullback(lambda x, tau: torch.sin(x), states, taus)
    first, second = torch.randn(2, BATCH, *CHUNK, dtype=DOUBLE)
    both = lean_adjoint(2 * first - 3 * second, pullback, grid)
    expected = 2 * lean_adjoint(first, pullback, grid) - 3 * lean_adjoint(second, pullback, grid)
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=1e-12)


# The scalar adjoint.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scalar_adjoint_is_the_paired_states_time_times_the_terminal_one(
    scheme: Scheme,
) -> None:
    terminal = torch.randn(BATCH, *CHUNK, dtype=DOUBLE)
    found = scalar_adjoint(terminal, TimeGrid(4, scheme))
    times = [0.25, 0.5, 0.75, 1.0] if scheme.pairs_with_next else [0.0, 0.25, 0.5, 0.75]
    assert torch.equal(found, torch.stack([time * terminal for time in times]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_in_shifted_euler_the_scalar_adjoint_is_exact_for_a_base_without_jacobian(
    steps: int,
) -> None:
    grid, terminal = TimeGrid(steps, ShiftedEuler()), torch.randn(BATCH, *CHUNK, dtype=DOUBLE)
    lean = lean_adjoint(terminal, lambda i, a: torch.zeros_like(a), grid)
    torch.testing.assert_close(scalar_adjoint(terminal, grid), lean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_in_the_posterior_chain_the_scalar_adjoint_is_exact_for_one_affine_base(
    steps: int,
) -> None:
    """Where ``A + B J = tau / u``, which is ``J = -h^2 / (u^2 S)``; -1 in the last step."""
    grid, terminal = TimeGrid(steps), torch.randn(BATCH, *CHUNK, dtype=DOUBLE)
    tau = np.arange(steps) / steps
    u, h = tau + 1 / steps, 1 / steps
    spread = (1 - tau) ** 2 - (tau / u) ** 2 * (1 - u) ** 2
    jacobian = -(h**2) / (u**2 * spread)
    moves = moves_of(Posterior(), steps)
    np.testing.assert_allclose(moves.keep + moves.gain * jacobian, tau / u, rtol=1e-12, atol=1e-14)
    assert jacobian[-1] == pytest.approx(-1.0)
    lean = lean_adjoint(terminal, lambda i, a: jacobian[i] * a, grid)
    torch.testing.assert_close(scalar_adjoint(terminal, grid), lean, rtol=1e-12, atol=1e-14)


def test_in_the_posterior_chain_the_scalar_adjoint_tends_to_that_of_a_base_without_jacobian() -> (
    None
):
    """First order, up to the logarithm that the steps' shares ``h / m`` near the action add to."""
    gaps = []
    for steps in (10, 40, 160, 640):
        grid, terminal = TimeGrid(steps), torch.ones(1, 1, 1, dtype=DOUBLE)
        lean = lean_adjoint(terminal, lambda i, a: torch.zeros_like(a), grid)
        gaps.append(float((lean - scalar_adjoint(terminal, grid)).abs().max()))
    assert gaps[0] < 0.35
    assert all(after < before / 2.5 for before, after in itertools.pairwise(gaps))
    assert gaps[-1] < 0.02

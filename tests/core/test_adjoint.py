from collections.abc import Callable

import pytest
import torch
from flow_problems import DOUBLE, autograd_pullback
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.sde import FinalStep, sample_path_and_next_action
from vla_trqam.time_grid import AdjointTime, TimeGrid, adjoint_tau

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
    field: Callable[[Tensor, Tensor], Tensor], states: Tensor, taus: list[float], grid: TimeGrid
) -> Tensor:
    """``d(-Q(X_K)) / dX_i`` by autograd through the base's Euler chain, its noise frozen.

    The noise is what makes the base's chain pass through the recorded states, whoever sampled them.
    """
    h = grid.step_size
    x = states[0].clone().requires_grad_(True)
    visited = []
    for i in range(grid.num_flow_steps):
        visited.append(x)
        tau = torch.full((len(x),), taus[i], dtype=x.dtype)
        drift = 2 * field(x, tau) - x / ((i + grid.time_shift) * h)
        step = x + h * drift
        x = step + (states[i + 1] - step).detach()
    return torch.stack(torch.autograd.grad(-terminal_q(x).sum(), visited))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("adjoint_time", ["next", "same"])
@pytest.mark.parametrize("final_step", ["noiseless_base", "sde"])
def test_the_lean_adjoint_is_autograd_through_the_base_chain_with_frozen_noise(
    final_step: FinalStep, adjoint_time: AdjointTime, shift: float, layer_norm: bool
) -> None:
    policy, grid = policy_of(layer_norm), TimeGrid(STEPS, shift)
    context = policy.encode(torch.randn(BATCH, 5, dtype=DOUBLE))
    noise = torch.randn(STEPS, BATCH, *CHUNK, dtype=DOUBLE)
    x_0, next_x_0 = torch.randn(2, BATCH, *CHUNK, dtype=DOUBLE)
    fields = policy.path_fields(context, context)
    path, _ = sample_path_and_next_action(
        fields, x_0, noise, next_x_0, grid, final_step=final_step, adjoint_time=adjoint_time
    )
    x_1 = path.x_1.clone().requires_grad_(True)
    (terminal,) = torch.autograd.grad(-terminal_q(x_1).sum(), x_1)
    adjoint = lean_adjoint(terminal, fields.base_pullback, grid)

    taus = [(i + (adjoint_time == "next")) / STEPS for i in range(STEPS)]
    expected = base_chain_gradients(
        lambda x, tau: policy.base_velocity(x, tau, context), path.x, taus, grid
    )
    assert adjoint.shape == (STEPS, BATCH, *CHUNK)
    torch.testing.assert_close(adjoint, expected, rtol=1e-10, atol=1e-12)


def test_next_and_same_differ_by_one_step_of_time() -> None:
    grid = TimeGrid(4)
    assert [adjoint_tau(grid, i, "same") for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert [adjoint_tau(grid, i, "next") for i in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_the_adjoint_of_a_zero_field_shrinks_by_the_memoryless_drift_alone(shift: float) -> None:
    grid = TimeGrid(STEPS, shift)
    terminal = torch.randn(BATCH, *CHUNK, dtype=DOUBLE)
    adjoint = lean_adjoint(terminal, lambda i, a: torch.zeros_like(a), grid)
    expected = terminal
    for i in reversed(range(STEPS)):
        expected = expected * (1 - 1 / (i + shift))
        torch.testing.assert_close(adjoint[i], expected, rtol=1e-12, atol=1e-14)


def test_the_pullback_gets_every_step_once_from_last_to_first() -> None:
    asked: list[int] = []

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        asked.append(step)
        return torch.zeros_like(cotangent)

    lean_adjoint(torch.ones(1, 1, 1), pullback, TimeGrid(5))
    assert asked == [4, 3, 2, 1, 0]


def test_the_adjoint_is_linear_in_its_terminal_value() -> None:
    grid = TimeGrid(5)
    states = torch.randn(5, BATCH, *CHUNK, dtype=DOUBLE)
    pullback = autograd_pullback(lambda x, tau: torch.sin(x), states, grid.taus(states))
    first, second = torch.randn(2, BATCH, *CHUNK, dtype=DOUBLE)
    both = lean_adjoint(2 * first - 3 * second, pullback, grid)
    expected = 2 * lean_adjoint(first, pullback, grid) - 3 * lean_adjoint(second, pullback, grid)
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=1e-12)

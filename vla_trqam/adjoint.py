"""The lean adjoint: carries ``-grad Q`` back along a path through the base field only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla_trqam.time_grid import TimeGrid

Pullback = Callable[[int, Tensor], Tensor]
"""``pullback(i, a)``: the vector-Jacobian product ``a^T d v_base / dx`` at the i-th state."""


@torch.no_grad()
def lean_adjoint(terminal_adjoint: Tensor, base_pullback: Pullback, grid: TimeGrid) -> Tensor:
    r"""Solves ``da/dtau = -a^T d/dx [2 v_base(x, tau) - x / tau]``, ``a(1) = -grad Q`` backwards.

    Adjoint Matching, eq. 38-39, discretised as the exact adjoint of the Euler chain:
    ``a_i = a_{i+1} + h (2 J_i^T a_{i+1} - a_{i+1} / (tau_i + d))``.

    Args:
        terminal_adjoint: ``a_K``, (B, H, A).
        base_pullback: ``(i, a) -> J_i^T a`` with ``J_i = d v_base / dx`` at ``X_i``.
        grid: the times.

    Returns:
        ``a_0 .. a_{K-1}``, (K, B, H, A), aligned with the states of the path.
    """
    h = grid.step_size
    adjoint = terminal_adjoint.new_empty((grid.num_flow_steps, *terminal_adjoint.shape))
    a = terminal_adjoint
    for i in reversed(range(grid.num_flow_steps)):
        torch.mul(a, 1.0 - h / grid.shifted_tau(i), out=adjoint[i])
        a = adjoint[i].add_(base_pullback(i, a), alpha=2.0 * h)
    return adjoint

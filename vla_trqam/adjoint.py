"""The adjoint: carries ``-grad Q`` back along a path, by the base field or by the time alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vla_trqam.time_grid import TimeGrid

AdjointKind = Literal["lean", "scalar"]

Pullback = Callable[[int, Tensor], Tensor]
"""``pullback(i, a)``: the vector-Jacobian product ``a^T d v_base / dx`` at the i-th state."""


@torch.no_grad()
def lean_adjoint(terminal_adjoint: Tensor, base_pullback: Pullback, grid: TimeGrid) -> Tensor:
    r"""Solves ``da/dtau = -a^T d/dx [2 v_base(x, tau) - x / tau]``, ``a(1) = -grad Q`` backwards.

    Adjoint Matching, eq. 38-39, discretised as the exact adjoint of the base's chain:
    ``a_i = A_i a_{i+1} + B_i J_i^T a_{i+1}``.

    Args:
        terminal_adjoint: ``a_K``, (B, H, A).
        base_pullback: ``(i, a) -> J_i^T a`` with ``J_i = d v_base / dx`` at ``X_i``.
        grid: the chain's steps.

    Returns:
        For every step the adjoint that the grid pairs with it, (K, B, H, A): ``a_1 .. a_K``, or
        ``a_0 .. a_{K-1}``.
    """
    count, ahead = grid.num_flow_steps, int(grid.pairs_with_next)
    adjoints = terminal_adjoint.new_empty((count + 1, *terminal_adjoint.shape))
    adjoints[count] = terminal_adjoint
    for i in reversed(range(ahead, count)):
        step, a = grid.steps[i], adjoints[i + 1]
        torch.mul(a, step.keep, out=adjoints[i])
        adjoints[i].add_(base_pullback(i, a), alpha=step.gain)
    return adjoints[ahead : ahead + count]


def scalar_adjoint(terminal_adjoint: Tensor, grid: TimeGrid) -> Tensor:
    r"""``a_i = tau_i a_K``: the lean adjoint of a base whose velocity does not depend on x.

    SQAM's closed form (arXiv 2610.10437): it solves ``da/dtau = a / tau``. No vector-Jacobian
    product is needed. It is the exact adjoint of such a base in the shifted Euler chain with a
    whole step's shift, where ``A_i = tau_i / tau_{i+1}``, at any K; and as K grows in the posterior
    chain, whose ``A_i`` is larger by ``h^2 / (tau_{i+1} (1 - tau_i))``.

    Args:
        terminal_adjoint: ``a_K``, (B, H, A).
        grid: the chain's steps.

    Returns:
        As :func:`lean_adjoint`.
    """
    ahead = int(grid.pairs_with_next)
    return torch.stack([grid.tau(i + ahead) * terminal_adjoint for i in range(grid.num_flow_steps)])

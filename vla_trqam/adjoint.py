"""The adjoint: carries ``-grad Q`` back along a path, through the base field only or in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vla_trqam.time_grid import TimeGrid, per_step

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
    paired = terminal_adjoint.new_empty((grid.num_flow_steps, *terminal_adjoint.shape))
    a = terminal_adjoint
    for i in reversed(range(grid.num_flow_steps)):
        if grid.pairs_with_next:
            paired[i] = a
            if i == 0:
                break
        before = torch.mul(a, grid.steps[i].keep)
        a = before.add_(base_pullback(i, a), alpha=grid.steps[i].gain)
        if not grid.pairs_with_next:
            paired[i] = a
    return paired


def scalar_adjoint(terminal_adjoint: Tensor, grid: TimeGrid) -> Tensor:
    r"""``a_i = tau_i a_K``: the lean adjoint of a base whose velocity does not depend on x.

    SQAM's closed form (arXiv 2610.10437): it solves ``da/dtau = a / tau``. In the shifted Euler
    chain with a whole step's shift it is the exact adjoint of such a base at any K, in the
    posterior chain as K grows. No vector-Jacobian product is needed.

    Args:
        terminal_adjoint: ``a_K``, (B, H, A).
        grid: the chain's steps.

    Returns:
        As :func:`lean_adjoint`.
    """
    ahead = int(grid.pairs_with_next)
    taus = [grid.tau(i + ahead) for i in range(grid.num_flow_steps)]
    repeated = terminal_adjoint.expand(len(taus), *terminal_adjoint.shape)
    return per_step(taus, repeated) * repeated

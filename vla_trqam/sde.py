"""Sampling from a velocity field: the memoryless SDE and the ODE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_trqam.policy import PathFields
from vla_trqam.time_grid import AdjointTime, TimeGrid, adjoint_tau, full_tau

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``v(x, tau)`` with x (B, H, A) and tau (B,), returning (B, H, A)."""

FinalStep = Literal["noiseless_base", "sde"]


@dataclass(frozen=True)
class Trajectory:
    """One path of the memoryless SDE for every sample of a batch.

    Attributes:
        x: X at ``tau_0 .. tau_K``, (K + 1, B, H, A); carries no gradient.
        grid: the times.
    """

    x: Tensor
    grid: TimeGrid

    @property
    def states(self) -> Tensor:
        """X at ``tau_0 .. tau_{K-1}``, where the field is evaluated: (K, B, H, A)."""
        return self.x[:-1]

    @property
    def x_1(self) -> Tensor:
        """The action chunk at ``tau = 1``: (B, H, A)."""
        return self.x[-1]


@torch.no_grad()
def sample_memoryless_sde(
    velocity: Velocity,
    x_0: Tensor,
    noise: Tensor,
    grid: TimeGrid,
    *,
    base_velocity: Velocity | None = None,
    final_step: FinalStep = "noiseless_base",
) -> Trajectory:
    r"""Euler-Maruyama on ``dX = (2 v - X / tau) dtau + g(tau) dW`` (Adjoint Matching, eq. 23).

    On the grid ``X_{i+1} = X_i + h (2 v(X_i, tau_i) - X_i / (tau_i + d)) + sqrt(h) g_i eps_i``.

    Args:
        velocity: the tuned field.
        x_0: standard normal, (B, H, A).
        noise: standard normal increments ``eps``, (K, B, H, A).
        grid: the times and ``g``.
        base_velocity: needed by ``final_step="noiseless_base"``.
        final_step: ``"noiseless_base"`` takes the last step as ``X + h v_base(X, tau_{K-1})`` (the
            authors' code); ``"sde"`` treats it as any other.

    Returns:
        The path; it carries no gradient.
    """
    assert noise.shape == (grid.num_flow_steps, *x_0.shape), (noise.shape, x_0.shape)
    x = _path_from(x_0, grid)
    for i in range(grid.num_flow_steps):
        tau = full_tau(grid.tau(i), x_0)
        if final_step == "noiseless_base" and i == grid.num_flow_steps - 1:
            if base_velocity is None:
                raise ValueError('final_step="noiseless_base" needs base_velocity')
            _noiseless_step(x, i, base_velocity(x[i], tau), grid)
        else:
            _sde_step(x, i, velocity(x[i], tau), noise[i], grid)
    return Trajectory(x, grid)


@torch.no_grad()
def sample_path_and_next_action(
    fields: PathFields,
    x_0: Tensor,
    noise: Tensor,
    next_x_0: Tensor,
    grid: TimeGrid,
    *,
    final_step: FinalStep = "noiseless_base",
    adjoint_time: AdjointTime = "next",
) -> tuple[Trajectory, Tensor]:
    """:func:`sample_memoryless_sde` and, on the same grid, :func:`sample_ode` of the next action.

    Args:
        fields: makes and keeps the evaluations.
        x_0: start of the path, (B, H, A).
        noise: its increments, (K, B, H, A).
        next_x_0: start of the next action's ODE, (B, H, A).
        grid: the times and ``g``.
        final_step: see :func:`sample_memoryless_sde`.
        adjoint_time: see :func:`~vla_trqam.time_grid.adjoint_tau`.

    Returns:
        The path, and the next action (B, H, A); neither carries a gradient.
    """
    assert noise.shape == (grid.num_flow_steps, *x_0.shape), (noise.shape, x_0.shape)
    x, next_x = _path_from(x_0, grid), next_x_0
    for i in range(grid.num_flow_steps):
        times = grid.tau(i), adjoint_tau(grid, i, adjoint_time)
        tuned, base, following = fields.evaluate(x[i], next_x, *times)
        if final_step == "noiseless_base" and i == grid.num_flow_steps - 1:
            _noiseless_step(x, i, base, grid)
        else:
            _sde_step(x, i, tuned, noise[i], grid)
        next_x = torch.add(next_x, following, alpha=grid.step_size)
    return Trajectory(x, grid), next_x


def _path_from(x_0: Tensor, grid: TimeGrid) -> Tensor:
    x = x_0.new_empty((grid.num_flow_steps + 1, *x_0.shape))
    x[0] = x_0
    return x


def _sde_step(x: Tensor, i: int, velocity: Tensor, noise: Tensor, grid: TimeGrid) -> None:
    h = grid.step_size
    torch.mul(x[i], 1.0 - h / grid.shifted_tau(i), out=x[i + 1])
    x[i + 1].add_(velocity, alpha=2.0 * h)
    x[i + 1].add_(noise, alpha=math.sqrt(h * grid.noise_scale_squared(i)))


def _noiseless_step(x: Tensor, i: int, velocity: Tensor, grid: TimeGrid) -> None:
    torch.add(x[i], velocity, alpha=grid.step_size, out=x[i + 1])


def sample_ode(velocity: Velocity, x_0: Tensor, grid: TimeGrid) -> Tensor:
    """Euler on ``dX = v(X, tau) dtau``: what the robot executes. (B, H, A) -> (B, H, A)."""
    x = x_0
    for i in range(grid.num_flow_steps):
        x = torch.add(x, velocity(x, full_tau(grid.tau(i), x_0)), alpha=grid.step_size)
    return x

"""Sampling from a velocity field: the memoryless chain and the ODE."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_trqam.policy import PathFields, Velocity
from vla_trqam.time_grid import Step, TimeGrid, full_tau


@dataclass(frozen=True)
class Trajectory:
    """One path of the memoryless chain for every sample of a batch.

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
) -> Trajectory:
    r"""The chain that discretises ``dX = (2 v - X / tau) dtau + g(tau) dW``.

    Adjoint Matching, eq. 23: ``X_{i+1} = A_i X_i + B_i v(X_i, tau_i) + sqrt(V_i) eps_i``.

    Args:
        velocity: the tuned field.
        x_0: standard normal, (B, H, A).
        noise: standard normal increments ``eps``, (K, B, H, A).
        grid: the chain's steps.
        base_velocity: needed where the grid has a noiseless step.

    Returns:
        The path; it carries no gradient.
    """
    assert noise.shape == (grid.num_flow_steps, *x_0.shape), (noise.shape, x_0.shape)
    x = _path_from(x_0, grid)
    for i, step in enumerate(grid.steps):
        tau = full_tau(step.tau, x_0)
        if not step.sampled_with_base:
            _sde_step(x, i, velocity(x[i], tau), noise[i], step)
        elif base_velocity is None:
            raise ValueError("a chain with a noiseless step needs base_velocity")
        else:
            _step_with_base(x, i, base_velocity(x[i], tau), grid)
    return Trajectory(x, grid)


@torch.no_grad()
def sample_path_and_next_action(
    fields: PathFields,
    x_0: Tensor,
    noise: Tensor,
    next_x_0: Tensor | None,
    grid: TimeGrid,
    *,
    jacobians: bool = True,
    trained: Collection[int] | None = None,
) -> tuple[Trajectory, Tensor | None]:
    """:func:`sample_memoryless_sde` and, on the same grid, :func:`sample_ode` of the next action.

    Args:
        fields: makes and keeps the evaluations.
        x_0: start of the path, (B, H, A).
        noise: its increments, (K, B, H, A).
        next_x_0: start of the next action's ODE, (B, H, A); None where none is wanted.
        grid: the chain's steps.
        jacobians: whether the adjoint will ask the fields for vector-Jacobian products.
        trained: steps whose tuned values will have a gradient; None for all.

    Returns:
        The path, and the next action (B, H, A) where it is wanted; neither carries a gradient.
    """
    assert noise.shape == (grid.num_flow_steps, *x_0.shape), (noise.shape, x_0.shape)
    x, next_x = _path_from(x_0, grid), next_x_0
    for i, step in enumerate(grid.steps):
        adjoint_tau = step.adjoint_tau if jacobians else None
        tuned, base, following = fields.evaluate(
            x[i], next_x, step.tau, adjoint_tau, trained=trained is None or i in trained
        )
        if step.sampled_with_base:
            _step_with_base(x, i, base, grid)
        else:
            _sde_step(x, i, tuned, noise[i], step)
        if next_x is not None:
            assert following is not None
            next_x = torch.add(next_x, following, alpha=grid.step_size)
    return Trajectory(x, grid), next_x


def _path_from(x_0: Tensor, grid: TimeGrid) -> Tensor:
    x = x_0.new_empty((grid.num_flow_steps + 1, *x_0.shape))
    x[0] = x_0
    return x


def _sde_step(x: Tensor, i: int, velocity: Tensor, noise: Tensor, step: Step) -> None:
    torch.mul(x[i], step.keep, out=x[i + 1])
    x[i + 1].add_(velocity, alpha=step.gain)
    x[i + 1].add_(noise, alpha=math.sqrt(step.variance))


def _step_with_base(x: Tensor, i: int, velocity: Tensor, grid: TimeGrid) -> None:
    torch.add(x[i], velocity, alpha=grid.step_size, out=x[i + 1])


def sample_ode(velocity: Velocity, x_0: Tensor, grid: TimeGrid) -> Tensor:
    """Euler on ``dX = v(X, tau) dtau``: what the robot executes. (B, H, A) -> (B, H, A)."""
    x = x_0
    for i in range(grid.num_flow_steps):
        x = torch.add(x, velocity(x, full_tau(grid.tau(i), x_0)), alpha=grid.step_size)
    return x

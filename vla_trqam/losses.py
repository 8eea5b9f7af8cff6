"""The losses: tensors in, scalars out."""

from __future__ import annotations

from torch import Tensor

from vla_trqam.time_grid import TimeGrid, per_step


def adjoint_matching_loss(
    control_gap: Tensor, adjoint: Tensor, grid: TimeGrid, lam: float
) -> Tensor:
    r"""TRQAM's regression of the field onto the adjoint.

    ``L = E_b sum_i || 2 (v_tuned - v_base)_i / sigma_i + sigma_i a_i ||^2`` with
    ``sigma_i = g_i / sqrt(lam)``; its minimiser is ``v_tuned - v_base = -g^2 a / (2 lam)``. With
    ``lam = 1`` and the adjoint multiplied by beta it is QAM's loss:
    ``L_TRQAM(lam) = lam L_QAM(1/lam)``.

    Args:
        control_gap: ``v_tuned - v_base`` along the path, (K, B, H, A); gradients flow through it.
        adjoint: the lean adjoint, (K, B, H, A); a target, it carries no gradient.
        grid: the times and ``g``.
        lam: the trust region's lambda.

    Returns:
        The loss, a scalar.
    """
    assert control_gap.shape == adjoint.shape, (control_gap.shape, adjoint.shape)
    sigma = per_step((grid.noise_scales_squared(adjoint) / lam).sqrt(), adjoint)
    target = (0.5 * sigma.square()) * adjoint.detach()
    residual = (control_gap + target) * (2.0 / sigma)
    return residual.square().sum() / residual.shape[1]


def flow_matching_target(action: Tensor, x_0: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the linear path and its velocity: ``(1 - tau) x_0 + tau a`` and ``a - x_0``.

    Args:
        action: (B, H, A).
        x_0: standard normal, (B, H, A).
        tau: (B,).
    """
    weight = tau.view(-1, *[1] * (action.ndim - 1))
    return (1.0 - weight) * x_0 + weight * action, action - x_0


def flow_matching_loss(velocity: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Behaviour cloning: the mean squared error of the velocity over real steps.

    Args:
        velocity: ``v(x_tau, tau; s)``, (B, H, A).
        target: ``a - x_0``, (B, H, A).
        valid: (B, H), steps really taken; the others weigh nothing, the mean is over all of them.
    """
    return ((velocity - target.detach()).square() * valid.unsqueeze(-1)).mean()


def pessimistic_value(q: Tensor, pessimism: float) -> Tensor:
    """``mean_e Q_e - rho std_e Q_e`` with the population's deviation: (E, B) -> (B,)."""
    if pessimism == 0.0:
        return q.mean(dim=0)
    return q.mean(dim=0) - pessimism * q.std(dim=0, correction=0)


def td_target(
    chunk_return: Tensor, discount: Tensor, terminated: Tensor, next_value: Tensor
) -> Tensor:
    """``R + gamma^n (1 - terminated) V(s')``: all (B,). A truncated chunk bootstraps."""
    return chunk_return + discount * (~terminated) * next_value


def td_loss(q: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The squared TD error, averaged over ensemble and batch: q (E, B), target and weight (B,)."""
    return ((q - target.detach()).square() * weight).mean()

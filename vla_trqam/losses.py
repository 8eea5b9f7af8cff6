"""The losses: tensors in, scalars out."""

from __future__ import annotations

from torch import Tensor

from vla_trqam.time_grid import TimeGrid, per_step


def adjoint_matching_loss(
    control_gap: Tensor,
    adjoint: Tensor,
    grid: TimeGrid,
    lam: float,
    weights: Tensor | None = None,
) -> Tensor:
    r"""TRQAM's regression of the field onto the adjoint.

    ``L = E_b sum_i lam / (h V_i) || B_i (v_tuned - v_base)_i + (V_i / lam) a_i ||^2`` with the
    adjoint ``a_i`` that the grid pairs with step i; its minimiser is ``v_tuned - v_base =
    -V a / (lam B)``, from which every step's distance weighs as in the path KL, times
    ``2 lam / h``. With ``sigma_i = g_i / sqrt(lam)`` and ``g^2 = 2 V / B`` the same is
    ``B / (2 h) || 2 (v_tuned - v_base) / sigma + sigma a ||^2``, where the first factor is 1 in the
    authors' scheme. With ``lam = 1`` and the adjoint multiplied by beta it is QAM's loss:
    ``L_TRQAM(lam) = lam L_QAM(1/lam)``. Where V is 0 the fields must agree: the target is 0, and
    the weight divides by :attr:`~vla_trqam.time_grid.Step.loss_variance`.

    Args:
        control_gap: ``v_tuned - v_base`` along the path, (K, B, H, A); gradients flow through it.
        adjoint: for every step the adjoint paired with it, (K, B, H, A); a target, it carries no
            gradient.
        grid: the chain's steps.
        lam: the trust region's lambda.
        weights: of every step's term, (K,); None for 1.

    Returns:
        The loss, a scalar.
    """
    assert control_gap.shape == adjoint.shape, (control_gap.shape, adjoint.shape)
    steps, h = grid.steps, grid.step_size
    scales = per_step([s.noise_scale_squared for s in steps], adjoint)
    noisy = per_step([float(s.noisy) for s in steps], adjoint)
    factors = per_step([(s.gain / (2.0 * h)) ** 0.5 for s in steps], adjoint)
    sigma = (scales / lam).sqrt()
    target = (0.5 * sigma.square() * noisy) * adjoint.detach()
    residual = (control_gap + target) * (2.0 / sigma * factors)
    if weights is None:
        return residual.square().sum() / residual.shape[1]
    return (residual.square().flatten(1).sum(1) * weights).sum() / residual.shape[1]


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

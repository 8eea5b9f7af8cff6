"""The flow's time grid, and the steps of the memoryless chain on it.

The only file that knows what happens at ``tau = 0`` and ``tau = 1``, and the only one that knows a
discretisation by name. Time runs from noise (``tau = 0``) to action (``tau = 1``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vla_trqam.errors import UserError

AdjointTime = Literal["next", "same"]
FinalStep = Literal["noiseless_base", "sde"]


@dataclass(frozen=True)
class Step:
    r"""One step of the chain: ``X_{i+1} = A X_i + B v(X_i, tau_i) + sqrt(V) eps``.

    Everything else follows from these three numbers: the base chain's adjoint
    ``a_i = A a_{i+1} + B J_i^T a_{i+1}``; the optimum ``v_tuned - v_base = -(V / (lam B)) a`` with
    the adjoint that the grid pairs with the step; and the KL of two such steps whose fields differ,
    ``B^2 / (2 V) ||v_tuned - v_base||^2`` nats.

    Attributes:
        tau: ``tau_i``, where the field is evaluated.
        keep: A.
        gain: B.
        variance: V; 0 where both fields must take the same step.
        loss_variance: the V that the loss's weight divides by; V itself where it is positive.
        adjoint_tau: the time at which the adjoint asks for ``J_i = d v_base / dx`` at ``X_i``; None
            where no step is paired with the adjoint ``a_i``.
        sampled_with_base: the sampler takes ``X_i + h v_base(X_i, tau_i)`` instead, whatever the
            loss, the adjoint and the KL make of the step.
    """

    tau: float
    keep: float
    gain: float
    variance: float
    loss_variance: float
    adjoint_tau: float | None
    sampled_with_base: bool

    @property
    def noisy(self) -> bool:
        """Whether the step has noise; otherwise both fields must take the same."""
        return self.variance > 0.0

    @property
    def noise_scale_squared(self) -> float:
        """``g^2 = 2 V / B`` of the loss: the optimum is ``v_tuned - v_base = -g^2 a / (2 lam)``."""
        return 2.0 * self.loss_variance / self.gain

    @property
    def kl_weight(self) -> float:
        """``B^2 / (2 V)``, nats per squared norm of ``v_tuned - v_base``; 0 without noise."""
        return self.gain / self.noise_scale_squared if self.noisy else 0.0


class Scheme(ABC):
    """A discretisation of the memoryless SDE on a grid.

    Attributes:
        pairs_with_next: whether the loss of step i takes the adjoint behind it, ``a_{i+1}`` (the
            exact one for the step), or the one before it, ``a_i``.
    """

    pairs_with_next: bool

    @abstractmethod
    def steps(self, grid: TimeGrid) -> tuple[Step, ...]:
        """The K steps of the chain.

        Raises:
            UserError: the grid has too few.
        """


@dataclass(frozen=True)
class Posterior(Scheme):
    r"""The flow's own posterior: ``x_u`` given ``x_tau`` and the end (ours; the default).

    Run the other way, the memoryless process noises an action, ``x_tau = c x_u + sqrt(S) eps`` with
    ``u = tau + h``, ``c = tau / u`` and ``S = (1 - tau)^2 - c^2 (1 - u)^2``, and keeps the linear
    path's distribution. A step draws ``x_u`` from its posterior given ``x_tau`` and the end that
    the field points at, ``x_1 = x + (1 - tau) v`` (DDPM, Ho et al. 2020, eq. 7; DDIM at
    ``eta = 1``, Song et al. 2021, eq. 12 and 16):

    ``A = (c (1 - u)^2 + u S) / (1 - tau)^2``, ``B = u S / (1 - tau)``,
    ``V = (1 - u)^2 S / (1 - tau)^2``.

    It needs no shift at ``tau = 0``, and its last step is noiseless by itself: there two fields
    that differ have an infinite KL, so the chain takes it with the base, and the loss holds the
    tuned field to the base's. Why this one: ``docs/method.md``.

    Attributes:
        last_step_weight: of that last step's squared difference in the loss, in units of the step
            before's. What acts is the tuned field, there too, and without a target it would follow
            the earlier steps' corrections as far as the network likes, uncounted by the KL.
    """

    last_step_weight: float = 1.0
    pairs_with_next = True

    def __post_init__(self) -> None:
        if not 0.0 < self.last_step_weight < float("inf"):
            raise UserError(
                f"last_step_weight is {self.last_step_weight}; it must be positive and finite"
            )

    def steps(self, grid: TimeGrid) -> tuple[Step, ...]:
        """See :class:`Scheme`."""
        count = grid.num_flow_steps
        if count < 2:
            raise UserError(
                "num_flow_steps is 1: the posterior chain's last step has no noise, and with one "
                "step there is nothing to tune; take at least 2, or the shifted_euler scheme"
            )
        moves = [self._moves(grid.tau(i), grid.tau(i + 1)) for i in range(count)]
        _, gain, variance = moves[-2]
        last = moves[-1][1] ** 2 * variance / (gain**2 * self.last_step_weight)
        return tuple(
            Step(
                tau=grid.tau(i),
                keep=keep,
                gain=gain,
                variance=variance,
                loss_variance=variance if i < count - 1 else last,
                adjoint_tau=grid.tau(i) if i else None,
                sampled_with_base=i == count - 1,
            )
            for i, (keep, gain, variance) in enumerate(moves)
        )

    @staticmethod
    def _moves(tau: float, u: float) -> tuple[float, float, float]:
        """A, B and V of a step from ``tau`` to ``u``."""
        c, left, rest = tau / u, 1.0 - tau, 1.0 - u
        spread = left**2 - (c * rest) ** 2
        keep = (c * rest**2 + u * spread) / left**2
        return keep, u * spread / left, rest**2 * spread / left**2


@dataclass(frozen=True)
class ShiftedEuler(Scheme):
    r"""Euler-Maruyama on ``dX = (2 v - X / tau) dtau + g dW`` with shifted times.

    In continuous time ``g^2 = 2 (1 - tau) / tau`` (Adjoint Matching, eq. 22-23), infinite at 0.
    Here both ``tau`` and ``1 - tau`` grow by ``d = time_shift h``: ``g_i^2 = 2 (1 - tau_i + d) /
    (tau_i + d)`` and ``A = 1 - h / (tau_i + d)``, ``B = 2 h``, ``V = h g_i^2``. With the defaults
    it is the authors' code, to the digit.

    Attributes:
        time_shift: ``d`` in units of h, in (0, 1]; smaller values approach the text.
        adjoint_time: "next" asks for the base's Jacobian at ``(X_i, tau_{i+1})``, "same" at
            ``(X_i, tau_i)``, where the chain evaluates its field.
        final_step: "noiseless_base" samples the last step as ``X + h v_base``; "sde" like any
            other. Adjoint, loss and KL treat it as an SDE step either way.
    """

    time_shift: float = 1.0
    adjoint_time: AdjointTime = "next"
    final_step: FinalStep = "noiseless_base"
    pairs_with_next = False

    def __post_init__(self) -> None:
        if not 0.0 < self.time_shift <= 1.0:
            raise UserError(f"time_shift is {self.time_shift}; it must be in (0, 1], in units of h")

    def steps(self, grid: TimeGrid) -> tuple[Step, ...]:
        """See :class:`Scheme`."""
        return tuple(self._step(grid, i) for i in range(grid.num_flow_steps))

    def _step(self, grid: TimeGrid, i: int) -> Step:
        count, h = grid.num_flow_steps, grid.step_size
        shifted = (i + self.time_shift) / count
        noise_scale_squared = 2.0 * (1.0 - grid.tau(i) + self.time_shift * h) / shifted
        variance = h * noise_scale_squared
        return Step(
            tau=grid.tau(i),
            keep=1.0 - h / shifted,
            gain=2.0 * h,
            variance=variance,
            loss_variance=variance,
            adjoint_tau=grid.tau(i + 1 if self.adjoint_time == "next" else i),
            sampled_with_base=self.final_step == "noiseless_base" and i == count - 1,
        )


@dataclass(frozen=True)
class TimeGrid:
    r"""``tau_i = i h`` with ``h = 1/K``, and the chain's steps on it.

    Attributes:
        num_flow_steps: K, the number of steps from noise to action.
        scheme: how the memoryless SDE is discretised; the ODE does not depend on it.
    """

    num_flow_steps: int
    scheme: Scheme = field(default_factory=Posterior)

    def __post_init__(self) -> None:
        if self.num_flow_steps < 1:
            raise UserError(f"num_flow_steps is {self.num_flow_steps}; it must be at least 1")

    @property
    def step_size(self) -> float:
        """``h = 1 / K``."""
        return 1.0 / self.num_flow_steps

    def tau(self, step: int) -> float:
        """``tau_i`` for ``i`` in ``0..K``."""
        return step / self.num_flow_steps

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The K steps of the chain."""
        return self.scheme.steps(self)

    @property
    def pairs_with_next(self) -> bool:
        """See :class:`Scheme`."""
        return self.scheme.pairs_with_next


def per_step(weights: list[float], path: Tensor) -> Tensor:
    """One number a step (K) to multiply a quantity along a path (K, B, H, A)."""
    assert len(weights) == len(path), (len(weights), path.shape)
    return path.new_tensor(weights).view(-1, *[1] * (path.ndim - 1))


def full_tau(tau: float, x: Tensor) -> Tensor:
    """The same time for every sample of a batch: (B,) for ``x`` of (B, ...)."""
    return torch.full(x.shape[:1], tau, dtype=x.dtype, device=x.device)

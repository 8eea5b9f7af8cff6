"""The contract an adapter fulfils: one policy, two velocity fields.

A :class:`FlowPolicy` holds the tuned field ``v_theta`` and the base field ``v_base``. The core asks
for three *shared evaluations* (:meth:`FlowPolicy.record_velocity`,
:meth:`FlowPolicy.base_velocities`, :meth:`FlowPolicy.base_pullback`); the defaults here are the
plain way to compute them, an adapter may do it faster as long as the numbers stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.time_grid import full_tau

Context = Any
"""What :meth:`FlowPolicy.encode` returned; opaque to the core."""

Pullback = Callable[[int, Tensor], Tensor]
"""``pullback(i, a)``: the vector-Jacobian product ``a^T d v_base / dx`` at the i-th state."""


class VelocityRecord:
    """The tuned field along one path: values while sampling, gradients afterwards.

    Calling it evaluates the field once and remembers the evaluation, so that the loss needs no
    second forward pass over states that the sampler has already visited.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._velocity = velocity
        self._values: list[Tensor] = []

    def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
        """``v_theta(x, tau)`` without gradient, (B, H, A)."""
        with torch.enable_grad():
            value = self._velocity(x.detach(), tau)
        self._values.append(value)
        return value.detach()

    def stacked(self) -> Tensor:
        """All evaluations in order, (K, B, H, A), with the graph back to the parameters."""
        return torch.stack(self._values)


class FlowPolicy(nn.Module, ABC):
    """A flow-matching policy with a tuned and a base velocity field, both in tau-time."""

    @property
    @abstractmethod
    def chunk_shape(self) -> tuple[int, int]:
        """``(H, A)``: chunk length and action dimension of the flow (padding included)."""

    @property
    @abstractmethod
    def num_flow_steps(self) -> int:
        """K, the Euler steps of the policy's own sampler; training uses the same grid."""

    @property
    def action_mask(self) -> Tensor:
        """(A,) bool: real action dimensions (True) against padded ones."""
        return torch.ones(self.chunk_shape[1], dtype=torch.bool)

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """The width of :meth:`features`."""

    @abstractmethod
    def encode(self, observation: Any) -> Context:
        """Everything about an observation that both fields share; called once per observation."""

    @abstractmethod
    def velocity(self, x: Tensor, tau: Tensor, context: Context) -> Tensor:
        """``v_theta(x, tau; s)``: x (B, H, A), tau (B,) -> (B, H, A)."""

    @abstractmethod
    def base_velocity(self, x: Tensor, tau: Tensor, context: Context) -> Tensor:
        """``v_base(x, tau; s)``: x (B, H, A), tau (B,) -> (B, H, A); no gradient to its weights."""

    @abstractmethod
    def features(self, context: Context) -> Tensor:
        """What the critic sees of the observation, (B, feature_dim), without gradient."""

    @abstractmethod
    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of ``v_theta`` that training moves."""

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Writes the tuned policy in the host library's own format."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, directory: Path) -> Self:
        """Reads it back; the base of the loaded policy is the loaded policy itself."""

    def start_base_training(self) -> None:
        """Makes the base trainable by behaviour cloning; policies whose base is frozen refuse."""
        raise UserError(
            f"train_base: the base of a {type(self).__name__} is frozen; set it to false"
        )

    def behaviour_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of a training base; none where it is frozen."""
        return iter(())

    def behaviour_velocity(self, x: Tensor, tau: Tensor, context: Context) -> Tensor:
        """The training base's field, whose EMA is ``v_base``: (B, H, A), (B,) -> (B, H, A)."""
        raise UserError(
            f"the base of a {type(self).__name__} is frozen; it has no field in training"
        )

    def update_base(self, rate: float) -> None:
        """Moves ``v_base`` towards a training base; a frozen base stays as it is."""

    def record_velocity(self, context: Context) -> VelocityRecord:
        """Starts a recording of ``v_theta`` along one path."""
        return VelocityRecord(lambda x, tau: self.velocity(x, tau, context))

    @torch.no_grad()
    def base_velocities(self, x: Tensor, tau: Tensor, context: Context) -> Tensor:
        """``v_base`` at K states of a path: x (K, B, H, A), tau (K,) -> (K, B, H, A), no gradient.

        One evaluation a step, in the shape the sampler uses: where both fields are equal the two
        values are then equal to the bit, and the KL at step 0 is exactly 0.
        """
        values = [
            self.base_velocity(x_i, full_tau(float(tau_i), x_i), context)
            for x_i, tau_i in zip(x, tau, strict=True)
        ]
        return torch.stack(values)

    def base_pullback(self, x: Tensor, tau: Tensor, context: Context) -> Pullback:
        """The pullback of ``v_base`` in x at K states: x (K, B, H, A), tau (K,)."""

        def pullback(step: int, cotangent: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x[step].detach().requires_grad_(True)
                value = self.base_velocity(point, full_tau(float(tau[step]), point), context)
            (gradient,) = torch.autograd.grad(value, point, cotangent)
            return gradient

        return pullback

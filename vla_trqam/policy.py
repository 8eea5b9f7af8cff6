"""The contract an adapter fulfils: one policy, two velocity fields.

A :class:`FlowPolicy` holds the tuned field ``v_theta`` and the base field ``v_base``. One update
asks for both along one path; :class:`PathFields` makes these evaluations once and shares them
between sampling, adjoint, loss and KL. The class here is the plain way to compute them; an adapter
may do it faster as long as the numbers stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.time_grid import full_tau

Context = Any
"""What :meth:`FlowPolicy.encode` returned; opaque to the core."""


class PathFields:
    """The fields along one path of the memoryless SDE, every evaluation made once.

    The values are of the path's dtype, float32, whatever the network's is.

    Args:
        policy: whose fields.
        context: of the path's observations.
        next_context: of the observations whose next action is sampled beside the path.
    """

    def __init__(self, policy: FlowPolicy, context: Context, next_context: Context) -> None:
        self._policy, self._context, self._next_context = policy, context, next_context
        self._points: list[tuple[Tensor, float]] = []
        self._tuned: list[Tensor] = []
        self._base: list[Tensor] = []

    def evaluate(
        self, x: Tensor, next_x: Tensor, tau: float, adjoint_tau: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step's evaluations, without gradient.

        Args:
            x: the path's state, (B, H, A).
            next_x: the state of the next action's ODE, (B, H, A).
            tau: the time of both.
            adjoint_tau: the time at which :meth:`base_pullback` is asked for at ``x``.

        Returns:
            ``v_theta(x, tau)``, ``v_base(x, tau)``, and ``v_theta(next_x, tau)`` of the next
            observation.
        """
        policy, time = self._policy, full_tau(tau, x)
        with torch.enable_grad():
            # A copy: the sampler writes the next state into the same storage, and the graph may
            # need this one.
            tuned = policy.velocity(x.clone(), time, self._context).to(x.dtype)
        with torch.no_grad():
            base = policy.base_velocity(x, time, self._context).to(x.dtype)
            following = policy.velocity(next_x, time, self._next_context).to(x.dtype)
        self._points.append((x, adjoint_tau))
        self._tuned.append(tuned)
        self._base.append(base)
        return tuned.detach(), base, following

    def tuned(self) -> Tensor:
        """``v_theta`` at all states in order, (K, B, H, A), with the graph to its parameters."""
        return torch.stack(self._tuned)

    def base(self) -> Tensor:
        """``v_base`` at all states in order, (K, B, H, A), without gradient."""
        return torch.stack(self._base)

    def base_pullback(self, step: int, cotangent: Tensor) -> Tensor:
        """``a^T d v_base / dx`` at the state of a step and the adjoint's time, (B, H, A)."""
        x, tau = self._points[step]
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            value = self._policy.base_velocity(point, full_tau(tau, point), self._context)
            value = value.to(x.dtype)
        (gradient,) = torch.autograd.grad(value, point, cotangent)
        return gradient


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

    def real_actions(self, x: Tensor) -> Tensor:
        """The dimensions that exist on the robot: (..., A) -> (..., a); what it executes."""
        mask = self.action_mask
        return x if bool(mask.all()) else x[..., mask.to(x.device)]

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest executed number in the flow's space: (), or (a,) by dimension."""
        return torch.tensor(-1.0), torch.tensor(1.0)

    def to_robot(self, action: Tensor) -> Tensor:
        """The flow's chunks (B, H, A) as the robot takes them, in its units: (B, H, a)."""
        return self.real_actions(action)

    def from_robot(self, action: Tensor) -> Tensor:
        """Executed chunks in the robot's units (B, H, a), in the flow's space: (B, H, A)."""
        return action

    def executed(self, action: Tensor, *, clip: bool = True) -> Tensor:
        """What the robot gets of a chunk: (B, H, A) -> (B, H, a), differentiable.

        The flow, its SDE, its adjoint and its KL live in all A dimensions, for padded ones feed
        back into real ones; the critic and its targets see this.

        Args:
            action: chunks of the flow.
            clip: keep to :attr:`action_limits`; beyond them the gradient is zero.
        """
        real = self.real_actions(action)
        low, high = self.action_limits
        return torch.clamp(real, low.to(real), high.to(real)) if clip else real

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

    def path_fields(self, context: Context, next_context: Context) -> PathFields:
        """Both fields along one path, and the tuned one along the next action's ODE."""
        return PathFields(self, context, next_context)

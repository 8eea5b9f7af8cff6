"""The contract an adapter fulfils: one policy, two velocity fields.

A :class:`FlowPolicy` holds the tuned field ``v_theta`` and the base field ``v_base``. One update
asks for both along one path; :class:`PathFields` makes these evaluations once and shares them
between sampling, adjoint, loss and KL. The class here is the plain way to compute them; an adapter
may do it faster as long as the numbers stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vla_trqam.errors import UserError
from vla_trqam.precision import own_precision
from vla_trqam.time_grid import full_tau

Context = Any
"""What :meth:`FlowPolicy.encode` returned; opaque to the core."""
Velocity = Callable[[Tensor, Tensor], Tensor]
"""``v(x, tau)`` with x (B, H, A) and tau (B,), returning (B, H, A)."""


class PathFields:
    """The fields along one path of the memoryless chain, every evaluation made once.

    Where the adjoint asks for the base's Jacobian at the time of the path, the evaluation that gave
    the base's value gives it too. The values are of the path's dtype, float32, whatever the
    network's is.

    Args:
        policy: whose fields.
        context: of the path's observations.
        next_context: of the observations whose next action is sampled beside the path.
        keep_activations: keep what gradients need of every step, or compute it again, one step at
            a time, when they are asked for: the same numbers in 1/K of the memory.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        context: Context,
        next_context: Context,
        *,
        keep_activations: bool = True,
    ) -> None:
        self._policy, self._context, self._next_context = policy, context, next_context
        self._keep_activations = keep_activations
        self._points: list[JacobianPoint] = []
        self._tuned: list[Tensor] = []
        self._base: list[Tensor] = []

    def evaluate(
        self,
        x: Tensor,
        next_x: Tensor | None,
        tau: float,
        adjoint_tau: float | None,
        *,
        trained: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step's evaluations, without gradient.

        Args:
            x: the path's state, (B, H, A).
            next_x: the state of the next action's ODE, (B, H, A); None where none is sampled.
            tau: the time of both.
            adjoint_tau: the time at which :meth:`base_pullback` is asked for at ``x``; None if it
                is not.
            trained: whether the tuned value will have a gradient.

        Returns:
            ``v_theta(x, tau)``, ``v_base(x, tau)``, and ``v_theta(next_x, tau)`` of the next
            observation, where it is asked for.
        """
        # A copy: the sampler writes the next state into the same storage, and a graph may need
        # this one.
        state = x.clone()
        with torch.set_grad_enabled(trained):
            tuned = self._trained_value(state, tau) if trained else self._tuned_value(state, tau)
        point = JacobianPoint.at(
            state, tau, adjoint_tau, self._base_value, keep=self._keep_activations
        )
        with torch.no_grad():
            following = None if next_x is None else self._next_value(next_x, tau)
        self._points.append(point)
        self._tuned.append(tuned)
        self._base.append(point.value)
        return tuned.detach(), point.value, following

    def tuned(self) -> Tensor:
        """``v_theta`` at all states in order, (K, B, H, A), with the graph to its parameters."""
        return torch.stack(self._tuned)

    def base(self) -> Tensor:
        """``v_base`` at all states in order, (K, B, H, A), without gradient."""
        return torch.stack(self._base)

    def base_pullback(self, step: int, cotangent: Tensor) -> Tensor:
        """``a^T d v_base / dx`` at the state of a step and the adjoint's time, (B, H, A).

        At most once a step.
        """
        return self._points[step].pullback(cotangent, self._base_value)

    def _trained_value(self, x: Tensor, tau: float) -> Tensor:
        if self._keep_activations:
            return self._tuned_value(x, tau)
        value: Tensor = checkpoint(self._tuned_value, x, tau, use_reentrant=False)
        return value

    def _tuned_value(self, x: Tensor, tau: float) -> Tensor:
        return self._policy.velocity(x, full_tau(tau, x), self._context).to(x.dtype)

    def _base_value(self, x: Tensor, tau: float) -> Tensor:
        return self._policy.base_velocity(x, full_tau(tau, x), self._context).to(x.dtype)

    def _next_value(self, x: Tensor, tau: float) -> Tensor:
        return self._policy.velocity(x, full_tau(tau, x), self._next_context).to(x.dtype)


FieldValue = Callable[[Tensor, float], Tensor]
"""``v(x, tau)`` at one time for the whole batch."""


@dataclass
class JacobianPoint:
    """A state of the path at which the base's value, and perhaps its Jacobian, is wanted.

    Attributes:
        x: the state, (B, H, A).
        value: ``v_base(x, tau)``, without gradient.
        adjoint_tau: the time of the Jacobian; None if it is not wanted.
        graph: the value with the graph to ``x``, where it serves both.
    """

    x: Tensor
    value: Tensor
    adjoint_tau: float | None
    graph: Tensor | None

    @classmethod
    def at(
        cls, x: Tensor, tau: float, adjoint_tau: float | None, base: FieldValue, *, keep: bool
    ) -> JacobianPoint:
        """Evaluates the base, with a graph where it is wanted and kept."""
        shared = keep and adjoint_tau == tau
        with torch.set_grad_enabled(shared):
            point = x.detach().requires_grad_(shared)
            value = base(point, tau)
        return cls(point, value.detach(), adjoint_tau, value if shared else None)

    def pullback(self, cotangent: Tensor, base: FieldValue) -> Tensor:
        """``a^T d v_base / dx``."""
        assert self.adjoint_tau is not None, "nobody said that this Jacobian would be wanted"
        value, self.graph = self.graph, None
        if value is None:
            self.x = self.x.detach().requires_grad_(True)
            with torch.enable_grad():
                value = base(self.x, self.adjoint_tau)
        # Of what the forward pass computed in float32, autocast would lower the backward one.
        with own_precision(cotangent):
            (gradient,) = torch.autograd.grad(value, self.x, cotangent)
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
        """K, the Euler steps of the policy's sampler; training uses the same grid."""

    @property
    def own_flow_steps(self) -> int:
        """K that the base came with, whatever :meth:`take_flow_steps` made of it since."""
        return self.num_flow_steps

    def take_flow_steps(self, count: int) -> None:
        """From now on the policy trains, acts and is saved with so many flow steps.

        Raises:
            UserError: it cannot, or the number is less than 1.
        """
        raise UserError(
            f"a {type(self).__name__} keeps its own {self.num_flow_steps} flow steps, not {count}"
        )

    @property
    def action_mask(self) -> Tensor:
        """(A,) bool: real action dimensions (True) against padded ones."""
        return torch.ones(self.chunk_shape[1], dtype=torch.bool)

    @cached_property
    def _has_padding(self) -> bool:
        """Whether there are padded dimensions; every update asks it often."""
        return not bool(self.action_mask.all())

    @property
    def executed_length(self) -> int:
        """Actions of a chunk that the robot executes before it asks again: n <= H."""
        return self.chunk_shape[0]

    def take_executed_length(self, count: int) -> None:
        """From now on so many actions of a chunk are executed, and the policy is saved so.

        Raises:
            UserError: it cannot, or chunks have not so many.
        """
        raise UserError(
            f"a {type(self).__name__} executes its own {self.executed_length} actions of a chunk, "
            f"not {count}"
        )

    @property
    def executed_size(self) -> int:
        """Numbers in what the robot executes of a chunk, n a."""
        return self.executed_length * int(self.action_mask.sum())

    def real_actions(self, x: Tensor) -> Tensor:
        """The dimensions that exist on the robot, of all actions: (..., H, A) -> (..., H, a)."""
        return x[..., self.action_mask.to(x.device)] if self._has_padding else x

    def embedded(self, action: Tensor, around: Tensor | None = None) -> Tensor:
        """What is executed (..., n, a) among all of the flow's numbers: (..., H, A).

        Args:
            action: the first n actions in the real dimensions.
            around: what all others are, (..., H, A); None for zero.
        """
        horizon, width = self.chunk_shape
        count = action.shape[-2]
        if not self._has_padding and count == horizon:
            return action
        shape = (*action.shape[:-2], horizon, width)
        whole = action.new_zeros(shape) if around is None else around.clone()
        whole[..., :count, self.action_mask.to(action.device)] = action
        return whole

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest executed number in the flow's space: (), or (a,) by dimension."""
        return _unit_limits()

    def to_robot(self, action: Tensor) -> Tensor:
        """What the robot takes of the flow's chunks (B, H, A), in its units: (B, n, a)."""
        return self.executed(action, clip=False)

    def from_robot(self, action: Tensor) -> Tensor:
        """Chunks in the robot's units (B, H, a), in the flow's space: (B, H, A)."""
        return action

    def executed(self, action: Tensor, *, clip: bool = True) -> Tensor:
        """What the robot gets of a chunk: (..., H, A) -> (..., n, a), differentiable.

        The flow, its SDE, its adjoint and its KL live in all H actions and A dimensions, for those
        that are not executed feed back into those that are; the critic and its targets see this.

        Args:
            action: chunks of the flow, or noise of one.
            clip: keep to :attr:`action_limits`; beyond them the gradient is zero.
        """
        real = self.real_actions(action[..., : self.executed_length, :])
        return self.within_limits(real) if clip else real

    def within_limits(self, real: Tensor) -> Tensor:
        """Clipped to :attr:`action_limits`, beyond which the gradient is zero: (..., a)."""
        low, high = self.action_limits
        return torch.clamp(real, low.to(real), high.to(real))

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

    def sampled_field(self, context: Context) -> Velocity:
        """``v_theta`` at given observations, for a sampler: no gradient, all rows at one time."""
        return lambda x, tau: self.velocity(x, tau, context)

    def path_fields(
        self, context: Context, next_context: Context, *, keep_activations: bool = True
    ) -> PathFields:
        """Both fields along one path, and the tuned one along the next action's ODE."""
        return PathFields(self, context, next_context, keep_activations=keep_activations)


@cache
def _unit_limits() -> tuple[Tensor, Tensor]:
    return torch.tensor(-1.0), torch.tensor(1.0)

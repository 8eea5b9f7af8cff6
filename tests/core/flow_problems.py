"""Flows whose every answer is known: Gaussian and two-mode bases, exact linear propagation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vla_trqam.policy import FlowPolicy
from vla_trqam.sde import Velocity, sample_memoryless_sde, sample_ode
from vla_trqam.time_grid import Posterior, ShiftedEuler, TimeGrid

DOUBLE = torch.float64
SCHEMES = (Posterior(), ShiftedEuler())
NOISY_TO_THE_END = ShiftedEuler(final_step="sde")


def gaussian_gain(tau: float, variance: float) -> float:
    """The factor of the field that carries N(0, 1) to N(0, variance) along the linear path."""
    return (tau * variance - (1.0 - tau)) / (tau**2 * variance + (1.0 - tau) ** 2)


def gaussian_field(variance: float) -> Velocity:
    """``v(x, tau) = gain(tau) x``."""

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        gain = (tau * variance - (1.0 - tau)) / (tau**2 * variance + (1.0 - tau) ** 2)
        return gain.view(-1, 1, 1) * x

    return velocity


class FunctionPolicy(FlowPolicy):
    """Two functions as a policy; observations are features are context.

    Args:
        tuned: the tuned field; where it is a module, its parameters are trained.
        base: the base field.
        chunk_shape: (H, A).
        num_flow_steps: K.
    """

    def __init__(
        self, tuned: Velocity, base: Velocity, chunk_shape: tuple[int, int], num_flow_steps: int
    ) -> None:
        super().__init__()
        self._tuned, self._base = tuned, base
        self._shape, self._steps = chunk_shape, num_flow_steps

    @property
    def chunk_shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def num_flow_steps(self) -> int:
        return self._steps

    @property
    def feature_dim(self) -> int:
        return 1

    def encode(self, observation: Any) -> Any:
        return observation

    def features(self, context: Any) -> Tensor:
        return context

    def velocity(self, x: Tensor, tau: Tensor, context: Any) -> Tensor:
        return self._tuned(x, tau)

    def base_velocity(self, x: Tensor, tau: Tensor, context: Any) -> Tensor:
        return self._base(x, tau)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return self._tuned.parameters() if isinstance(self._tuned, nn.Module) else iter(())

    def save_pretrained(self, directory: Path) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        raise NotImplementedError


@dataclass(frozen=True)
class AffineMap:
    """What a sampler with an affine field does to its noise, in one dimension.

    Attributes:
        mean: the terminal state without any noise.
        response: the terminal state's slope in each of x_0, eps_0 .. eps_{K-1}.
        path_mean: the states without any noise, (K + 1,).
        path_response: the states' slopes, (K + 1, 1 + K).
    """

    path_mean: Tensor
    path_response: Tensor

    @property
    def mean(self) -> float:
        return float(self.path_mean[-1])

    @property
    def variance(self) -> float:
        return float(self.path_response[-1].square().sum())


def propagate(velocity: Velocity, grid: TimeGrid, base: Velocity) -> AffineMap:
    """Feeds the library's sampler of the chain nothing, then one unit of each random number."""
    steps = grid.num_flow_steps
    inputs = torch.cat([torch.zeros(1, steps + 1), torch.eye(steps + 1)]).to(DOUBLE)
    x_0 = inputs[:, 0].view(-1, 1, 1)
    noise = inputs[:, 1:].t().reshape(steps, -1, 1, 1)
    path = sample_memoryless_sde(velocity, x_0, noise, grid, base_velocity=base).x[:, :, 0, 0]
    return AffineMap(path[:, 0], path[:, 1:] - path[:, :1])


def ode_variance(velocity: Velocity, grid: TimeGrid) -> float:
    """The variance of the Euler ODE's end: its only random number is x_0."""
    end = sample_ode(velocity, torch.ones(1, 1, 1, dtype=DOUBLE), grid)
    return float(end.square())


def autograd_pullback(
    velocity: Velocity, x: Tensor, taus: Tensor
) -> Callable[[int, Tensor], Tensor]:
    """``(i, a) -> a^T dv/dx`` at the states x (K, B, H, A)."""

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x[step].detach().requires_grad_(True)
            value = velocity(point, taus[step].expand(len(point)))
        return torch.autograd.grad(value, point, cotangent)[0]

    return pullback


@dataclass(frozen=True)
class Mixture:
    """A one-dimensional mixture of equally likely Gaussians as the action distribution.

    Attributes:
        means: their centres.
        variance: shared.
    """

    means: tuple[float, ...]
    variance: float

    def density(self, x: Tensor) -> Tensor:
        parts = [torch.exp(-0.5 * (x - m) ** 2 / self.variance) for m in self.means]
        return sum(parts, torch.zeros_like(x))

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        """``E[x_1 - x_0 | x_tau = x]``, exact."""
        t = tau.view(-1, 1, 1, 1)
        means = x.new_tensor(self.means)
        spread = t**2 * self.variance + (1.0 - t) ** 2
        offset = x.unsqueeze(-1) - t * means
        weight = torch.softmax(-0.5 * offset**2 / spread, dim=-1)
        each = means + (t * self.variance - (1.0 - t)) / spread * offset
        return (weight * each).sum(-1)

"""The critic: an ensemble of Q functions over chunks, its target network and action gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import by_kernels
from vla_trqam.losses import pessimistic_value
from vla_trqam.networks import LAYER_NORM_EPS, tanh_gelu
from vla_trqam.precision import own_precision

Pair = tuple[Tensor, Tensor]


class EnsembleLinear(nn.Module):
    """One affine map per ensemble member: ``y_e = x_e W_e + b_e`` with weight (E, in, out)."""

    def __init__(self, ensemble_size: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Variance scaling on the average fan, uniform (Glorot), as in the authors' networks.
        bound = math.sqrt(6.0 / (in_dim + out_dim))
        weight = torch.empty(ensemble_size, in_dim, out_dim).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(ensemble_size, out_dim))


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation with one scale and shift per ensemble member, (E, dim) each."""

    def __init__(self, ensemble_size: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ensemble_size, dim))
        self.bias = nn.Parameter(torch.zeros(ensemble_size, dim))


class CriticEnsemble(nn.Module):
    """``Q_e(s, a)``, e = 1..E: MLPs with tanh-GELU and, by default, layer normalisation after it.

    Args:
        feature_dim: width of the observation features.
        action_dim: numbers in a chunk, H * A.
        hidden_dims: widths of the hidden layers.
        ensemble_size: E.
        layer_norm: normalise after every activation.

    Raises:
        UserError: hidden_dims or ensemble_size is empty or not positive.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256, 256),
        ensemble_size: int = 10,
        *,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        if ensemble_size < 1:
            raise UserError(f"ensemble_size is {ensemble_size}; it must be at least 1")
        if min(hidden_dims, default=0) < 1:
            raise UserError(
                f"hidden_dims is {list(hidden_dims)}; it must hold widths of at least 1"
            )
        self.ensemble_size = ensemble_size
        self.hidden_dims, self.layer_norm = tuple(hidden_dims), layer_norm
        widths = [feature_dim + action_dim, *hidden_dims]
        layers = [
            EnsembleLinear(ensemble_size, i, o)
            for i, o in zip(widths, [*widths[1:], 1], strict=True)
        ]
        norms = [EnsembleLayerNorm(ensemble_size, width) for width in widths[1:] if layer_norm]
        # A ModuleList forgets what it holds.
        self.layers = cast("Sequence[EnsembleLinear]", nn.ModuleList(layers))
        self.norms = cast("Sequence[EnsembleLayerNorm]", nn.ModuleList(norms))

    def weights(self) -> list[nn.Parameter]:
        """``self.parameters()``, without the search for modules that every update would pay."""
        parts = (*self.layers, *self.norms)
        return [p for part in parts for p in part._parameters.values() if p is not None]

    def forward(self, features: Tensor, action: Tensor, *, frozen: bool = False) -> Tensor:
        """Features (B, F), action (B, H, A) -> (E, B) in the weights' dtype.

        Differentiable once by the kernel, as often as one likes by plain torch. Under autocast too:
        values in bfloat16 would not tell neighbouring actions apart.

        Args:
            features: of the observations.
            action: chunks.
            frozen: the gradient reaches the action and not the weights.
        """
        inputs = torch.cat([features, action.flatten(1)], dim=1).to(self.layers[0].weight.dtype)
        layers = [_pair(layer.weight, layer.bias, frozen) for layer in self.layers]
        norms = [_pair(norm.scale, norm.bias, frozen) for norm in self.norms]
        with own_precision(inputs):
            if by_kernels():
                from vla_trqam.kernels.ensemble import EnsembleWeights, ensemble_values

                return ensemble_values(inputs, EnsembleWeights(layers, norms, LAYER_NORM_EPS))
            return _plain_values(inputs, layers, norms)


def _pair(first: Tensor, second: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
    return (first.detach(), second.detach()) if frozen else (first, second)


def _plain_values(inputs: Tensor, layers: Sequence[Pair], norms: Sequence[Pair]) -> Tensor:
    """What :func:`vla_trqam.kernels.ensemble.ensemble_values` computes, by autograd's own means."""
    *hidden, (head, head_bias) = layers
    x = inputs.expand(len(head), -1, -1)
    for index, (weight, bias) in enumerate(hidden):
        x = tanh_gelu(torch.baddbmm(bias.unsqueeze(1), x, weight))
        if norms:
            scale, shift = norms[index]
            normal = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
            x = normal * scale.unsqueeze(1) + shift.unsqueeze(1)
    return torch.baddbmm(head_bias.unsqueeze(1), x, head).squeeze(-1)


class Executed(Protocol):
    """What is executed of a policy's chunks, (B, H, A) -> (B, n, a)."""

    def __call__(self, action: Tensor, *, clip: bool = True) -> Tensor:
        """Clipped to the limits, or not."""


def in_box(action: Tensor, *, clip: bool = True) -> Tensor:
    """All dimensions; the limits are -1 and 1."""
    return action.clamp(-1.0, 1.0) if clip else action


class Critic(nn.Module):
    """An ensemble with its slowly following target.

    Args:
        ensemble: the online network.
        pessimism: rho of ``mean_e Q - rho std_e Q`` in the TD target.
        adjoint_pessimism: the rho of the value whose action gradient starts the adjoint; 0, the
            plain mean, in the authors' code. Above 0 it steers away from where the members differ.
        target_rate: the target's EMA rate.
        clip_actions: take the action gradient at the clipped action, as the authors' code does:
            beyond the limits it is zero.
        gradient_noise: makes the action gradient wrong on purpose, to see what an imperfect critic
            does: Gaussian noise of so many times its own size, fresh in every update.

    Raises:
        UserError: a pessimism, target_rate or gradient_noise is out of its range.
    """

    def __init__(
        self,
        ensemble: CriticEnsemble,
        *,
        pessimism: float = 0.5,
        adjoint_pessimism: float = 0.0,
        target_rate: float = 0.005,
        clip_actions: bool = True,
        gradient_noise: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"pessimism": pessimism, "adjoint_pessimism": adjoint_pessimism}
        for name, size in {**sizes, "gradient_noise": gradient_noise}.items():
            if not 0.0 <= size < math.inf:
                raise UserError(f"{name} is {size}; it must be finite and not negative")
        if not 0.0 <= target_rate <= 1.0:
            raise UserError(f"target_rate is {target_rate}; it must be in [0, 1]")
        self.online = ensemble
        self.target = copy.deepcopy(ensemble).requires_grad_(False)
        self.pessimism, self.adjoint_pessimism = pessimism, adjoint_pessimism
        self.target_rate = target_rate
        self.clip_actions, self.gradient_noise = clip_actions, gradient_noise

    @torch.no_grad()
    def next_value(self, features: Tensor, action: Tensor) -> Tensor:
        """The pessimistic target value, (B,)."""
        return pessimistic_value(self.target(features, action), self.pessimism)

    def action_gradient(
        self,
        features: Tensor,
        action: Tensor,
        executed: Executed = in_box,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The target value's gradient at every sample, and that value (by default the mean's).

        Args:
            features: (B, F).
            action: the policy's chunks, (B, H, A).
            executed: what the critic sees of them, as :meth:`FlowPolicy.executed`.
            noise: standard normal, (B, H, A), of which ``gradient_noise`` takes what it adds.

        Returns:
            The gradient to ``action`` (B, H, A) and the value (B,), both detached.
        """
        with torch.enable_grad():
            point = action.detach().requires_grad_(True)
            q = self.target(features, executed(point, clip=self.clip_actions))
            value = pessimistic_value(q, self.adjoint_pessimism)
            with own_precision(point):
                (gradient,) = torch.autograd.grad(value.sum(), point)
        if self.gradient_noise > 0.0 and noise is not None:
            gradient = made_wrong(gradient, noise, self.gradient_noise)
        return gradient, value.detach()

    def update_target(self) -> None:
        """``target <- (1 - rate) target + rate online``."""
        ema_update(self.target.weights(), self.online.weights(), self.target_rate)


def made_wrong(gradient: Tensor, noise: Tensor, size: float) -> Tensor:
    """A gradient plus noise, sample by sample ``size`` times as large as itself.

    What is zero stays so: padded dimensions, and what is beyond the limits.

    Args:
        gradient: (B, H, A).
        noise: standard normal, (B, H, A).
        size: of the noise's root mean square over the gradient's.
    """
    there = gradient != 0.0
    square = gradient.square().sum(dim=(1, 2), keepdim=True)
    scale = (square / there.sum(dim=(1, 2), keepdim=True).clamp(min=1)).sqrt()
    return gradient + size * scale * noise * there


@torch.no_grad()
def ema_update(average: Iterable[Tensor], current: Iterable[Tensor], rate: float) -> None:
    """``average <- (1 - rate) average + rate current``, tensor by tensor."""
    torch._foreach_lerp_(list(average), list(current), rate)

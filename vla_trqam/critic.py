"""The critic: an ensemble of Q functions over chunks, its target network and action gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vla_trqam.gelu import tanh_gelu
from vla_trqam.losses import pessimistic_value

LAYER_NORM_EPS = 1e-6


class EnsembleLinear(nn.Module):
    """One affine map per ensemble member: ``y_e = x_e W_e + b_e`` with weight (E, in, out)."""

    def __init__(self, ensemble_size: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Variance scaling on the average fan, uniform (Glorot), as in the authors' networks.
        bound = math.sqrt(6.0 / (in_dim + out_dim))
        weight = torch.empty(ensemble_size, in_dim, out_dim).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(ensemble_size, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(E, B, in) -> (E, B, out)."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation with one scale and shift per ensemble member."""

    def __init__(self, ensemble_size: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ensemble_size, dim))
        self.bias = nn.Parameter(torch.zeros(ensemble_size, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(E, B, dim) -> (E, B, dim)."""
        normal = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.bias.unsqueeze(1), normal, self.scale.unsqueeze(1))


class CriticEnsemble(nn.Module):
    """``Q_e(s, a)``, e = 1..E: MLPs with tanh-GELU and, by default, layer normalisation after it.

    Args:
        feature_dim: width of the observation features.
        action_dim: numbers in a chunk, H * A.
        hidden_dims: widths of the hidden layers.
        ensemble_size: E.
        layer_norm: normalise after every activation.
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
        self.ensemble_size = ensemble_size
        widths = [feature_dim + action_dim, *hidden_dims]
        self.layers = nn.ModuleList(
            EnsembleLinear(ensemble_size, a, b)
            for a, b in zip(widths, [*widths[1:], 1], strict=True)
        )
        self.norms = nn.ModuleList(
            EnsembleLayerNorm(ensemble_size, width) for width in widths[1:] if layer_norm
        )

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Features (B, F), action (B, H, A) -> (E, B)."""
        inputs = torch.cat([features, action.flatten(1)], dim=1)
        x = inputs.unsqueeze(0).expand(self.ensemble_size, -1, -1)
        for index, layer in enumerate(self.layers[:-1]):
            x = tanh_gelu(layer(x))
            if self.norms:
                x = self.norms[index](x)
        return self.layers[-1](x).squeeze(-1)


class Critic(nn.Module):
    """An ensemble with its slowly following target.

    Args:
        ensemble: the online network.
        pessimism: rho of ``mean_e Q - rho std_e Q`` in the TD target.
        target_rate: the target's EMA rate.
        clip_actions: evaluate at ``clip(a, -1, 1)``, as the authors' code does: beyond the box the
            action gradient is zero.
    """

    def __init__(
        self,
        ensemble: CriticEnsemble,
        *,
        pessimism: float = 0.5,
        target_rate: float = 0.005,
        clip_actions: bool = True,
    ) -> None:
        super().__init__()
        self.online = ensemble
        self.target = copy.deepcopy(ensemble).requires_grad_(False)
        self.pessimism = pessimism
        self.target_rate = target_rate
        self.clip_actions = clip_actions

    @torch.no_grad()
    def next_value(self, features: Tensor, action: Tensor) -> Tensor:
        """The pessimistic target value, (B,)."""
        return pessimistic_value(self.target(features, action), self.pessimism)

    def action_gradient(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """``grad_a mean_e Q_e`` of the target ensemble at every sample, and that mean.

        Args:
            features: (B, F).
            action: (B, H, A).

        Returns:
            The gradient (B, H, A) and the mean value (B,), both detached.
        """
        with torch.enable_grad():
            point = action.detach().requires_grad_(True)
            inside = point.clamp(-1.0, 1.0) if self.clip_actions else point
            value = self.target(features, inside).mean(dim=0)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return gradient, value.detach()

    def update_target(self) -> None:
        """``target <- (1 - rate) target + rate online``."""
        ema_update(self.target.parameters(), self.online.parameters(), self.target_rate)


@torch.no_grad()
def ema_update(
    average: Iterable[nn.Parameter], current: Iterable[nn.Parameter], rate: float
) -> None:
    """``average <- (1 - rate) average + rate current``, parameter by parameter."""
    torch._foreach_lerp_(list(average), list(current), rate)

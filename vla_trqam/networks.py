"""Plain networks: the hidden block that every network here shares, and a Gaussian squashed by tanh.

A hidden block is Dense, tanh-GELU, and after it, where wanted, layer normalisation; the last layer
is bare (github yonghdong/trqam).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import by_kernels
from vla_trqam.precision import own_precision

LAYER_NORM_EPS = 1e-6
LOG_STD_RANGE = (-20.0, 2.0)


def tanh_gelu(z: Tensor) -> Tensor:
    """``z/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))``, of any shape (Hendrycks & Gimpel)."""
    if by_kernels():
        from vla_trqam.kernels.gelu import tanh_gelu as fast_gelu

        return fast_gelu(z)
    return F.gelu(z, approximate="tanh")


class MLP(nn.Module):
    """Hidden blocks and a bare last layer; autocast leaves it alone, as it does the critic.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        hidden_dims: widths of the hidden layers.
        layer_norm: normalise after every activation.

    Raises:
        UserError: a width is not positive.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dims: Sequence[int], *, layer_norm: bool = False
    ) -> None:
        super().__init__()
        if min(hidden_dims, default=1) < 1:
            raise UserError(f"hidden_dims is {list(hidden_dims)}; its widths must be at least 1")
        widths = [in_dim, *hidden_dims]
        layers = [nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], out_dim], strict=True)]
        norms = [nn.LayerNorm(w, eps=LAYER_NORM_EPS) for w in widths[1:] if layer_norm]
        # A ModuleList forgets what it holds.
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(layers))
        self.norms = cast("Sequence[nn.LayerNorm]", nn.ModuleList(norms))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        with own_precision(inputs):
            return self.layers[-1](self.hidden(inputs))

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the last layer is given: (N, in) -> (N, width of the last hidden layer)."""
        h = inputs
        for index, layer in enumerate(self.layers[:-1]):
            h = tanh_gelu(layer(h))
            if self.norms:
                h = self.norms[index](h)
        return h


class TanhGaussian(nn.Module):
    r"""``z = tanh(u)`` with ``u ~ N(mean(s), std(s)^2)``: a distribution over a box.

    Its density is computed from u: ``log p(z) = sum_d [log N(u) - 2 (log 2 - u - softplus(-2 u))]``
    (Haarnoja et al., 2018, appendix C, in the stable form of github yonghdong/trqam).

    Args:
        in_dim: width of what it is conditioned on.
        out_dim: numbers in z.
        hidden_dims: widths of the hidden layers.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.trunk = MLP(in_dim, out_dim, hidden_dims)
        *_, mean = self.trunk.layers
        self.log_std = nn.Linear(mean.in_features, out_dim)
        nn.init.xavier_uniform_(self.log_std.weight)
        nn.init.zeros_(self.log_std.bias)

    def forward(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Samples with their log-density.

        Args:
            inputs: (N, in).
            noise: standard normal, (N, out).

        Returns:
            z in (-1, 1), (N, out), and ``log p(z)``, (N,).
        """
        with own_precision(inputs):
            h = self.trunk.hidden(inputs)
            mean = self.trunk.layers[-1](h)
            log_std = self.log_std(h).clamp(*LOG_STD_RANGE)
        u = mean + log_std.exp() * noise
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        squash = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return u.tanh(), (normal - squash).sum(dim=1)

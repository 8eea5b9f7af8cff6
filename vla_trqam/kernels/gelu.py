r"""The tanh-approximated GELU, written so that a CPU computes it fast.

``gelu(z) = z/2 (1 + tanh(c (z + 0.044715 z^3)))`` with ``c = sqrt(2 / pi)`` (Hendrycks & Gimpel,
2016) is the same function as ``z sigmoid(2 c z + 2 c 0.044715 z^3)``, and torch's vectorised
sigmoid is faster than its tanh. The slope is computed beside the value, where the
sigmoid is at hand.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def tanh_gelu(z: Tensor) -> Tensor:
    """The activation, differentiable once; of any shape."""
    if torch.is_grad_enabled() and z.requires_grad:
        return _TanhGelu.apply(z)
    return _inner(z, _CUBIC).mul_(z).sigmoid_().mul_(z)


def tanh_gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu(z)`` and ``gelu'(z)``; no gradient flows.

    With ``s`` the sigmoid: ``gelu' = s + z s (1 - s) (2 c + 3 * 2 c 0.044715 z^2)``.
    """
    s = _inner(z, _CUBIC).mul_(z).sigmoid_()
    value = torch.mul(z, s)
    rest = torch.addcmul(value, value, s, value=-1.0)
    return value, s.addcmul_(rest, _inner(z, 3.0 * _CUBIC))


def tanh_gelu_(z: Tensor, sigmoid: Tensor, value: Tensor) -> Tensor:
    """:func:`tanh_gelu` into ``value``; leaves its sigmoid in ``sigmoid``."""
    torch.addcmul(_linear(z.dtype, z.device), z, z, value=_CUBIC, out=sigmoid)
    sigmoid.mul_(z).sigmoid_()
    return torch.mul(z, sigmoid, out=value)


def tanh_gelu_slope_(z: Tensor, sigmoid: Tensor, value: Tensor, slope: Tensor) -> None:
    """``gelu'(z)`` into ``slope``, from what :func:`tanh_gelu_` left; overwrites ``z``."""
    torch.addcmul(value, value, sigmoid, value=-1.0, out=slope)
    torch.addcmul(_linear(z.dtype, z.device), z, z, value=3.0 * _CUBIC, out=z)
    torch.addcmul(sigmoid, slope, z, out=slope)


def _inner(z: Tensor, cubic: float) -> Tensor:
    """``2 c + cubic z^2`` in one pass: torch converts a Python number anew at every addition."""
    return torch.addcmul(_linear(z.dtype, z.device), z, z, value=cubic)


@cache
def _linear(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_LINEAR, dtype=dtype, device=device)


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        value, slope = tanh_gelu_and_slope(z)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope

"""The values of an ensemble of MLPs as one node of autograd, instead of some thirty.

What its gradients need is kept on a tape, layer by layer, and they are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vla_trqam.kernels.gelu import tanh_gelu, tanh_gelu_and_slope
from vla_trqam.precision import own_precision

_NOTHING = torch.empty(0)
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EnsembleWeights:
    """The members' weights, stacked.

    Attributes:
        layers: weight (E, in, out) and bias (E, out) of every layer; the last has one output.
        norms: scale and shift, (E, width) each, after every hidden layer's activation; or none.
        eps: of the layer norms.
    """

    layers: Sequence[Pair]
    norms: Sequence[Pair]
    eps: float

    def flat(self) -> list[Tensor]:
        """All of them: those of the layers, then those of the norms."""
        return [weight for pair in (*self.layers, *self.norms) for weight in pair]


def ensemble_values(inputs: Tensor, weights: EnsembleWeights) -> Tensor:
    """(B, in) -> (E, B); differentiable once, by the inputs and by all weights."""
    if torch.is_grad_enabled():
        return cast("Tensor", _EnsembleValues.apply(inputs, weights, *weights.flat()))
    return _evaluate(inputs, weights)


@torch.no_grad()
def _evaluate(
    inputs: Tensor, weights: EnsembleWeights, tape: list[_HiddenLayer] | None = None
) -> Tensor:
    """(B, in) -> (E, B); the tape gets what gradients need."""
    *layers, (head, head_bias) = weights.layers
    x = inputs.expand(len(head), -1, -1)
    for index, (weight, bias) in enumerate(layers):
        z = torch.baddbmm(bias.unsqueeze(1), x, weight)
        record = _HiddenLayer(x)
        if tape is None:
            x = tanh_gelu(z)
        else:
            x, record.slope = tanh_gelu_and_slope(z)
            tape.append(record)
        if weights.norms:
            x = record.normalise(x, weights.norms[index], weights.eps)
    if tape is not None:
        tape.append(_HiddenLayer(x))
    # With one output, a sum of products is faster than a matrix product.
    return (x * head.transpose(1, 2)).sum(dim=-1).add_(head_bias)


@torch.no_grad()
def _pullback(
    weights: EnsembleWeights,
    tape: list[_HiddenLayer],
    cotangent: Tensor,
    *,
    to_weights: bool,
    to_inputs: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of ``<cotangent, output>``, cotangent (E, B), on a tape of :func:`_evaluate`.

    Returns:
        The gradient to the inputs, (B, in), and those to ``weights.flat()``.
    """
    layers, norms = weights.layers, weights.norms
    of_layers: list[Tensor] = []
    of_norms: list[Tensor] = []
    if to_weights:
        weight = torch.bmm(cotangent.unsqueeze(1), tape[-1].inputs).transpose(1, 2)
        of_layers = [weight, cotangent.sum(dim=1, keepdim=True)]
    g = cotangent.unsqueeze(-1) * layers[-1][0].transpose(1, 2)
    for index in reversed(range(len(tape) - 1)):
        record = tape[index]
        if norms:
            if to_weights:
                of_norms[:0] = [(g * record.normal).sum(dim=1), g.sum(dim=1)]
            g = record.through_norm(g.mul_(norms[index][0].unsqueeze(1)))
        g = g.mul_(record.slope)
        if to_weights:
            of_layers[:0] = [torch.bmm(record.inputs.transpose(1, 2), g), g.sum(dim=1)]
        if index or to_inputs:
            g = torch.bmm(g, layers[index][0].transpose(1, 2))
    return g.sum(dim=0) if to_inputs else None, of_layers + of_norms


@dataclass
class _HiddenLayer:
    """What the gradients of one layer need, (E, B, width) each."""

    inputs: Tensor
    slope: Tensor = _NOTHING
    value: Tensor = _NOTHING
    normal: Tensor = _NOTHING
    mean: Tensor = _NOTHING
    rstd: Tensor = _NOTHING

    def normalise(self, value: Tensor, norm: Pair, eps: float) -> Tensor:
        """Layer norm with each member's scale and shift."""
        self.value = value
        # torch's kernel is slower without a weight than with ones.
        width, (scale, shift) = value.shape[-1:], norm
        self.normal, self.mean, self.rstd = torch.native_layer_norm(
            value, width, _ones(width[0], value.dtype, value.device), None, eps
        )
        return torch.addcmul(shift.unsqueeze(1), self.normal, scale.unsqueeze(1))

    def through_norm(self, g: Tensor) -> Tensor:
        """The gradient to :meth:`normalise`'s value from the one to ``normal``."""
        wanted = [True, False, False]
        gradient: Tensor = torch.ops.aten.native_layer_norm_backward(
            g, self.value, self.value.shape[-1:], self.mean, self.rstd, None, None, wanted
        )[0]
        return gradient


@cache
def _ones(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(width, dtype=dtype, device=device)


class _EnsembleValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: EnsembleWeights, *_: Tensor) -> Tensor:
        ctx.weights, ctx.tape = weights, []
        return _evaluate(inputs, weights, ctx.tape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_inputs, _, *to_weights = ctx.needs_input_grad
        wanted = any(to_weights)
        with own_precision(gradients[0]):
            to_input, of_weights = _pullback(
                ctx.weights, ctx.tape, gradients[0], to_weights=wanted, to_inputs=to_inputs
            )
        return to_input, None, *(of_weights if wanted else [None] * len(to_weights))

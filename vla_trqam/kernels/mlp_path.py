"""The evaluations of two MLPs along a path, shared, their gradients written by hand.

One update needs four values at every step of a path: the tuned and the base field where the SDE is,
the base field there at the adjoint's time, and the tuned field where the next action's ODE is. They
are one batched matrix product of two networks a layer. The gradients are written out on the stored
activations: the numbers of autograd without a second forward pass and without the overhead of many
small operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from vla_trqam.kernels.gelu import tanh_gelu_, tanh_gelu_slope_
from vla_trqam.precision import own_precision

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """An MLP of Dense, tanh-GELU and, where there are norms, layer norm; the last layer is bare.

    Attributes:
        layers: weight (out, in) and bias (out,).
        norms: scale and shift after every hidden layer's activation; or none.
        eps: of the layer norms.
    """

    layers: Sequence[Pair]
    norms: Sequence[Pair]
    eps: float

    def flat(self) -> list[Tensor]:
        """All weights: those of the layers, then those of the norms."""
        return [weight for pair in (*self.layers, *self.norms) for weight in pair]

    def same_weights(self, other: Network) -> bool:
        """To the bit."""
        pairs = zip(self.flat(), other.flat(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


@dataclass
class Tape:
    """Activations of N evaluations, kept for gradients: one entry a hidden layer.

    Attributes:
        inputs: what every layer multiplies, (N, width) each; the first is ``concat(s, x, tau)``.
        slopes: the activations' derivatives, (N, width) each.
        normed: what every layer norm got, its mean and its reciprocal deviation.
    """

    inputs: list[Tensor]
    slopes: list[Tensor]
    normed: list[tuple[Tensor, ...]]

    @classmethod
    def empty(cls, network: Network, leading: tuple[int, ...]) -> Tape:
        """Room for evaluations in an array of this shape."""
        new = network.layers[0][0].new_empty
        widths = [weight.shape[1] for weight, _ in network.layers]
        return cls(
            [new(*leading, width) for width in widths],
            [new(*leading, width) for width in widths[1:]],
            [
                (new(*leading, width), new(*leading, 1), new(*leading, 1))
                for width in widths[1 : 1 + len(network.norms)]
            ],
        )

    def __getitem__(self, index: int) -> Tape:
        """The evaluations at this first index of the array, as views."""
        return Tape(
            [t[index] for t in self.inputs],
            [t[index] for t in self.slopes],
            [tuple(t[index] for t in entry) for entry in self.normed],
        )

    def steps(self) -> list[Tape]:
        """The evaluations at every second index of the array, as views."""
        inputs, slopes = ([t.unbind(1) for t in kind] for kind in (self.inputs, self.slopes))
        normed = [[t.unbind(1) for t in entry] for entry in self.normed]
        return [
            Tape(
                [t[step] for t in inputs],
                [t[step] for t in slopes],
                [tuple(t[step] for t in entry) for entry in normed],
            )
            for step in range(self.inputs[0].shape[1])
        ]

    def flat(self) -> Tape:
        """All evaluations of the array in one row."""
        return Tape(
            [t.flatten(0, -2) for t in self.inputs],
            [t.flatten(0, -2) for t in self.slopes],
            [tuple(t.flatten(0, -2) for t in entry) for entry in self.normed],
        )


@torch.no_grad()
def _input_pullback(network: Network, tape: Tape, cotangent: Tensor, columns: slice) -> Tensor:
    """``J^T a`` over some of the input's columns: (N, out) -> (N, columns)."""
    weights = [weight for weight, *_ in network.layers]
    weights[0] = weights[0][:, columns]
    g = cotangent @ weights[-1]
    for index in reversed(range(len(tape.slopes))):
        g = _activation_pullback(network, tape, index, g) @ weights[index]
    return g


@torch.no_grad()
def _weight_gradients(network: Network, tape: Tape, cotangent: Tensor) -> list[Tensor]:
    """Gradients of ``<cotangent, output>`` to ``network.flat()``."""
    of_layers: list[Tensor] = []
    of_norms: list[Tensor] = []
    g = cotangent
    for index in reversed(range(len(network.layers))):
        if index < len(tape.slopes):
            g = _activation_pullback(network, tape, index, g, of_norms)
        of_layers[:0] = [g.t() @ tape.inputs[index], g.sum(dim=0)]
        if index:
            g = g @ network.layers[index][0]
    return of_layers + of_norms


def _activation_pullback(
    network: Network,
    tape: Tape,
    index: int,
    g: Tensor,
    norm_gradients: list[Tensor] | None = None,
) -> Tensor:
    """Back through (layer norm and) GELU; prepends the norm's gradients where asked."""
    if network.norms:
        scale, shift = network.norms[index]
        value, mean, rstd = tape.normed[index]
        wanted = [True, norm_gradients is not None, norm_gradients is not None]
        g, *of_norm = torch.ops.aten.native_layer_norm_backward(
            g, value, scale.shape, mean, rstd, scale, shift, wanted
        )
        if norm_gradients is not None:
            norm_gradients[:0] = of_norm
    return g.mul_(tape.slopes[index])


@dataclass(frozen=True)
class _StackedLayer:
    """One layer of the base and the tuned network.

    Attributes:
        weights: as a batched product takes them, of both networks in one or one after the other.
        biases: likewise.
        norm: scale and shift for every block of rows, (blocks, 1, width).
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    norm: Pair | None

    @classmethod
    def of(cls, networks: Sequence[Network], index: int, blocks: Sequence[int]) -> _StackedLayer:
        layers = [network.layers[index] for network in networks]
        norm = None
        if index < len(networks[0].norms):
            norms = [networks[number].norms[index] for number in blocks]
            norm = _stack([scale for scale, _ in norms]), _stack([shift for _, shift in norms])
        # Stacked as the product wants them: it is faster than on transposed ones.
        weight = torch.stack([weight.detach().t() for weight, _ in layers])
        bias = _stack([bias for _, bias in layers])
        if blocks.count(0) == blocks.count(1):
            return cls([weight], [bias], norm)
        return cls(weight.split(1), bias.split(1), norm)


def _stack(vectors: Sequence[Tensor]) -> Tensor:
    """(width,) each -> (networks, 1, width), to be added to every row."""
    return torch.stack([vector.detach() for vector in vectors]).unsqueeze(1)


class _Work:
    """What a layer needs for a moment, (blocks, rows, width) each, with the views that it takes."""

    def __init__(self, stack: _Stack, like: Tensor) -> None:
        self.z, self.sigmoid, self.value = (torch.empty_like(like) for _ in range(3))
        self.z_parts, self.value_parts = stack.parts(self.z), stack.parts(self.value)
        self.kept: tuple[Tensor, Tensor, Tensor] = (
            self.z[stack.kept],
            self.sigmoid[stack.kept],
            self.value[stack.kept],
        )


class _Stack:
    """The base and the tuned network on blocks of rows, a batched product or two a layer.

    The blocks: the base at the path's states, where asked for, and again (or only) at the adjoint's
    time; the tuned network at the path's states, and at the next action's.

    What a layer needs for a moment is one set a width, used again by every layer and step: it stays
    in the processor's cache.
    """

    def __init__(
        self,
        base: Network,
        tuned: Network,
        features: Tensor,
        next_features: Tensor,
        *,
        base_blocks: int,
    ) -> None:
        blocks = [0] * base_blocks + [1, 1]
        count, (rows, width) = len(blocks), features.shape
        self._equal = base_blocks == 2
        self.kept = slice(count - 3, count - 1)
        self._layers = [
            _StackedLayer.of([base, tuned], index, blocks) for index in range(len(base.layers))
        ]
        self._inputs = features.new_empty(count, rows, base.layers[0][0].shape[1])
        self._inputs[..., :width] = features
        self._inputs[-1, :, :width] = next_features
        self._states = self._inputs[..., width:-1]
        self._times = self._inputs[..., -1]
        self._input_parts = self.parts(self._inputs)
        self._eps = base.eps
        self._work: dict[int, _Work] = {}
        for layer in self._layers[:-1]:
            size = layer.biases[0].shape[-1]
            if size not in self._work:
                self._work[size] = _Work(self, features.new_empty(count, rows, size))

    def parts(self, blocks: Tensor) -> Sequence[Tensor]:
        """(blocks, rows, width) as the products take them."""
        width = blocks.shape[-1]
        if self._equal:
            return [blocks.view(2, -1, width)]
        return [blocks[:1], blocks[1:].view(1, -1, width)]

    def forward(
        self, x: Tensor, next_x: Tensor, tau: float, adjoint_tau: float | None, tape: Tape
    ) -> Tensor:
        """The blocks' values, (blocks, rows, H * A).

        Args:
            x: the path's states.
            next_x: those of the next action.
            tau: the time of both.
            adjoint_tau: that of the second block of the base, where there are two.
            tape: gets the activations of the two blocks along the path that have a gradient.
        """
        self._states.copy_(x)
        self._states[-1].copy_(next_x)
        self._times.fill_(tau)
        if self._equal and adjoint_tau is not None:
            self._times[1].fill_(adjoint_tau)
        h, h_parts = self._inputs, self._input_parts
        for index, layer in enumerate(self._layers[:-1]):
            work = self._work[layer.biases[0].shape[-1]]
            tape.inputs[index].copy_(h[self.kept])
            _products(layer, h_parts, work.z_parts)
            h, h_parts = tanh_gelu_(work.z, work.sigmoid, work.value), work.value_parts
            tanh_gelu_slope_(*work.kept, tape.slopes[index])
            if layer.norm is not None:
                h, *statistics = _layer_norm(work.value, layer.norm, self._eps)
                h_parts = self.parts(h)
                for stored, found in zip(
                    tape.normed[index], (work.value, *statistics), strict=True
                ):
                    stored.copy_(found[self.kept])
        tape.inputs[-1].copy_(h[self.kept])
        head = self._layers[-1]
        values = h.new_empty(*h.shape[:-1], head.biases[0].shape[-1])
        _products(head, h_parts, self.parts(values))
        return values


def _products(layer: _StackedLayer, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    for bias, x, weight, out in zip(layer.biases, inputs, layer.weights, outputs, strict=True):
        torch.baddbmm(bias, x, weight, out=out)


class SharedPath:
    """All evaluations of a step in one or two products a layer, activations kept for gradients.

    The tuned field is wanted at the path's states and at the next action's; the base at the path's
    states, and where the adjoint asks at another time, there a second time: then both networks have
    two blocks of rows, and are one product.

    Args:
        tuned: of ``concat(features, x, tau)``, (B, F + H * A + 1) -> (B, H * A).
        base: likewise, of the same widths.
        features: of the path's observations, (B, F).
        next_features: of those whose next action is sampled beside the path, (B, F).
        num_flow_steps: K.
    """

    _BASE, _TUNED = range(2)

    def __init__(
        self,
        tuned: Network,
        base: Network,
        features: Tensor,
        next_features: Tensor,
        num_flow_steps: int,
    ) -> None:
        self._tuned_network, self._base_network = tuned, base
        self._features = features, next_features
        # Equal weights are one function, but two places of one batched product may round apart (by
        # alignment, by where threads split it), and the KL of equal fields is exactly 0.
        self._base_is_tuned = tuned.same_weights(base)
        batch, width = features.shape
        self._columns = slice(width, -1)
        self._tape = Tape.empty(tuned, (2, num_flow_steps, batch))
        self._step_tapes = self._tape.steps()
        self._tuned_values: list[Tensor] = []
        self._base_values: list[Tensor] = []

    @cached_property
    def _base_once(self) -> _Stack:
        return _Stack(self._base_network, self._tuned_network, *self._features, base_blocks=1)

    @cached_property
    def _base_twice(self) -> _Stack:
        return _Stack(self._base_network, self._tuned_network, *self._features, base_blocks=2)

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, next_x: Tensor, tau: float, adjoint_tau: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step's values, without gradient: tuned and base at x, tuned at the next action's x.

        Args:
            x: the path's state, (B, H, A).
            next_x: that of the next action's ODE, (B, H, A).
            tau: the time of both.
            adjoint_tau: the time at which :meth:`base_pullback` is asked for at x, or None.
        """
        once = adjoint_tau is None or adjoint_tau == tau
        stack = self._base_once if once else self._base_twice
        tape = self._step_tapes[len(self._tuned_values)]
        with own_precision(x):
            values = stack.forward(x.flatten(1), next_x.flatten(1), tau, adjoint_tau, tape)
        found = values.view(-1, *x.shape)
        tuned, following = found[-2], found[-1]
        base = tuned if self._base_is_tuned else found[0]
        self._tuned_values.append(tuned)
        self._base_values.append(base)
        return tuned, base, following

    def tuned(self) -> Tensor:
        """All values, (K, B, H, A), with a graph of one node: one pass back over the path."""
        tape = self._tape[self._TUNED].flat()
        network, values = self._tuned_network, torch.stack(self._tuned_values)
        return cast("Tensor", _ReplayedPath.apply(values, network, tape, *network.flat()))

    def base(self) -> Tensor:
        """All values, (K, B, H, A), without gradient."""
        return torch.stack(self._base_values)

    def base_pullback(self, step: int, cotangent: Tensor) -> Tensor:
        """``a^T d v_base / dx`` at the state of a step and the adjoint's time, (B, H, A)."""
        tape = self._step_tapes[step][self._BASE]
        with own_precision(cotangent):
            gradient = _input_pullback(
                self._base_network, tape, cotangent.flatten(1), self._columns
            )
        return gradient.view_as(cotangent)


def _layer_norm(value: Tensor, norm: Pair, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised value, its mean and its reciprocal deviation."""
    scale, shift = norm
    width = value.shape[-1:]
    normal, mean, rstd = torch.native_layer_norm(value, width, None, None, eps)
    return torch.addcmul(shift, normal, scale), mean, rstd


class _ReplayedPath(torch.autograd.Function):
    """Values computed earlier, with the gradient to the weights that produced them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, network: Network, tape: Tape, *_: Tensor) -> Tensor:
        ctx.network, ctx.tape = network, tape
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = gradients
        flat = cotangent.reshape(-1, cotangent.shape[-2] * cotangent.shape[-1])
        with own_precision(flat):
            return None, None, None, *_weight_gradients(ctx.network, ctx.tape, flat)

"""What the critic sees of an observation: the frozen prefix's states, averaged, and the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError

Pooling = Literal["all", "parts"]
"""Over all of a prefix's tokens, or over each camera's and the rest's by themselves."""


@dataclass(frozen=True)
class CriticFeatures:
    """Which features an adapter over a vision-language model gives to the critic.

    The language model's states at one layer are averaged over the prefix's valid tokens (images,
    instruction; padding is left out). Layers count as in transformers' ``hidden_states``: 0 is what
    enters the first layer, i what leaves the i-th, and the last one, -1, is normalised. The action
    loss of pi0 and SmolVLA gives the last layer's output no gradient (the expert reads each layer's
    keys and values only), so -1 is what the vision-language model made of the scene, and a middle
    layer is closer to what the action expert reads.

    Attributes:
        layer: the layer, or None for no language model states at all.
        state: append the proprioceptive state as the preprocessor normalised it. pi0's prefix does
            not hold it, pi05's holds it as text, SmolVLA's as one token of many.
        pooling: what is averaged over: "all" tokens, or "parts", each of C cameras and the rest by
            itself, C + 1 averages side by side.
    """

    layer: int | None = -1
    state: bool = True
    # Not shown: features that were kept before there was a choice are known by what is.
    pooling: Pooling = field(default="all", repr=False)

    def __post_init__(self) -> None:
        if self.layer is None and not self.state:
            raise UserError("the critic gets no features: give features.layer or features.state")


def layer_index(layer: int, num_layers: int) -> int:
    """``layer`` counted from the front, in ``0..num_layers``.

    Raises:
        UserError: there is no such layer.
    """
    index = layer + num_layers + 1 if layer < 0 else layer
    if not 0 <= index <= num_layers:
        raise UserError(
            f"critic_layer is {layer}; this policy's prefix has the layers 0 to {num_layers} "
            f"(or -1 to {-num_layers - 1}, from the back)"
        )
    return index


@contextmanager
def recorded_layer_input(layers: Sequence[nn.Module], index: int) -> Iterator[list[Tensor]]:
    """Collects what enters the layer of this number; nothing for the one behind the last."""
    record: list[Tensor] = []
    if index == len(layers):
        yield record
        return

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        record.append(inputs[0])

    # SmolVLA calls a layer's parts, never the layer itself; its first norm gets the layer's input.
    norm = layers[index].get_submodule("input_layernorm")
    handle = norm.register_forward_pre_hook(keep)
    try:
        yield record
    finally:
        handle.remove()


def mean_over_valid(states: Tensor, valid: Tensor) -> Tensor:
    """States (B, L, W) averaged over the tokens that ``valid`` (B, L) marks: (B, W), float32."""
    assert states.shape[:2] == valid.shape, (states.shape, valid.shape)
    weight = valid.to(torch.float32).unsqueeze(-1)
    return (states.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


def mean_over_parts(states: Tensor, valid: Tensor, parts: Sequence[int]) -> Tensor:
    """The same for consecutive parts of so many tokens, side by side: (B, P W).

    A camera that the host masks has no valid token: its part is 0.
    """
    assert sum(parts) == states.shape[1], (parts, states.shape)
    pairs = zip(states.split(list(parts), dim=1), valid.split(list(parts), dim=1), strict=True)
    return torch.cat([mean_over_valid(own, mask) for own, mask in pairs], dim=1)

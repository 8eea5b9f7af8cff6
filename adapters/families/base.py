"""What a family of host policies must answer to be seen as a velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from transformers import DynamicCache

Observation = Mapping[str, Any]
"""A batch as the host's preprocessor returns it, with or without actions."""


@dataclass(frozen=True)
class PrefixPass:
    """What one pass over an observation found.

    Attributes:
        condition: what the family's velocity wants to know of the observation.
        states: the prefix's states at the asked layer, (B, L, W).
        valid: which of its tokens are no padding, (B, L).
        parts: consecutive tokens that belong together, L in all: each picture's, then the rest.
    """

    condition: Any
    states: Tensor
    valid: Tensor
    parts: tuple[int, ...]


def parts_of(pictures: int, count: int, length: int) -> tuple[int, ...]:
    """The tokens of each of so many pictures, which have ``count`` together, and the rest.

    All have as many, for a host resizes all cameras to one size.
    """
    if pictures == 0:
        return (length,)
    assert count % pictures == 0, (pictures, count)
    return *((count // pictures,) * pictures), length - count


class FlowFamily(ABC):
    """How one kind of host policy is asked.

    Attributes:
        trained_parts: dotted names of the modules that fine-tuning may move: the action expert and
            its projections. Nothing in the prefix is among them, so one prefix serves both fields.
        mixes_precisions: whether the host computes with trained parts in float32 behind a prefix in
            half precision.
        steps_field: the name of the config's number of flow steps.
        lora_overrides: for LeRobot's ``wrap_with_peft``, beside its default targets.
        without_camera: what the host makes of a camera that an observation lacks; None where it
            needs every camera of its config.
    """

    trained_parts: Sequence[str]
    mixes_precisions: bool = False
    steps_field: str
    lora_overrides: Mapping[str, Any] = {}
    without_camera: str | None = None

    @abstractmethod
    def refusals(self, config: Any) -> Iterator[str]:
        """One sentence for each setting of the config that cannot be honoured."""

    @abstractmethod
    def chunk_shape(self, config: Any) -> tuple[int, int]:
        """``(H, A)`` of the flow."""

    def num_flow_steps(self, config: Any) -> int:
        """K of the host's sampler."""
        steps: int = getattr(config, self.steps_field)
        return steps

    def set_flow_steps(self, config: Any, count: int) -> None:
        """Gives the host's sampler another K."""
        setattr(config, self.steps_field, count)

    @abstractmethod
    def masks_padded_steps(self, config: Any) -> bool:
        """Whether the host's training loss leaves out the steps behind an episode's end."""

    @abstractmethod
    def prefix_layers(self, host: PreTrainedPolicy) -> Sequence[nn.Module]:
        """The language model's layers."""

    @abstractmethod
    def prefix_width(self, host: PreTrainedPolicy) -> int:
        """W of :attr:`PrefixPass.states`."""

    @abstractmethod
    def encode(self, host: PreTrainedPolicy, observation: Observation, layer: int) -> PrefixPass:
        """The prefix, with the states at one of its layers (counted from the front)."""

    @abstractmethod
    def velocity(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, condition: Any) -> Tensor:
        """``v(x, tau)`` from noise to action: (B, H, A), (B,) -> (B, H, A)."""

    # The same in many points of the same observations.

    @abstractmethod
    def share(self, host: PreTrainedPolicy, condition: Any, points: int) -> Any:
        """What evaluations at so many points of every observation share, for one field's weights.

        With gradient where gradients are on: it may depend on trained weights.
        """

    @abstractmethod
    def velocities(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        """:meth:`velocity` at N points of every observation: (B, N, H, A), (N,) -> (B, N, H, A).

        The numbers are :meth:`velocity`'s up to the order of sums.
        """

    @abstractmethod
    def pack(self, condition: Any) -> dict[str, Tensor]:
        """The condition as tensors (B, ...)."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Any:
        """The condition that :meth:`pack` was given."""


@dataclass(frozen=True)
class CachedPrefix:
    """A vision-language prefix, as a condition.

    Attributes:
        pad_masks: its tokens that are no padding, (B, L).
        cache: keys and values of every layer.
        suffix: what else the host's ``denoise_step`` takes, by name.
    """

    pad_masks: Tensor
    cache: Any
    suffix: dict[str, Tensor] = field(default_factory=dict)


class CachedPrefixFamily(FlowFamily):
    """A vision-language prefix in a cache, which an action expert attends to.

    LeRobot's time runs from 1, noise, to 0; the velocity is turned round here, once.
    """

    @staticmethod
    @abstractmethod
    def language_model(host: PreTrainedPolicy) -> Any:
        """The prefix's transformer."""

    def own_cache(self, cache: Any) -> Any:
        """A cache for one evaluation; here the host copies what it changes."""
        return cache

    def chunk_shape(self, config: Any) -> tuple[int, int]:
        """``(chunk_size, max_action_dim)``."""
        return config.chunk_size, config.max_action_dim

    def prefix_layers(self, host: PreTrainedPolicy) -> Sequence[nn.Module]:
        """The language model's, as many as the policy keeps."""
        return self.language_model(host).layers

    def prefix_width(self, host: PreTrainedPolicy) -> int:
        """The language model's hidden size."""
        return self.language_model(host).config.hidden_size

    def velocity(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, condition: Any) -> Tensor:
        """``-u(x, 1 - tau)`` by the host's ``denoise_step``."""
        u = host.model.denoise_step(
            prefix_pad_masks=condition.pad_masks,
            past_key_values=self.own_cache(condition.cache),
            x_t=x,
            timestep=1.0 - tau,
            **condition.suffix,
        )
        return -u

    def pack(self, condition: Any) -> dict[str, Tensor]:
        """Keys and values of all layers, (B, layers, heads, L, width) each, mask and suffix."""
        layers = condition.cache.layers
        return {
            "keys": torch.stack([layer.keys for layer in layers], dim=1),
            "values": torch.stack([layer.values for layer in layers], dim=1),
            "mask": condition.pad_masks,
            **condition.suffix,
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> CachedPrefix:
        """The same back."""
        layers = zip(tensors["keys"].unbind(1), tensors["values"].unbind(1), strict=True)
        suffix = {k: v for k, v in tensors.items() if k not in ("keys", "values", "mask")}
        return CachedPrefix(tensors["mask"], DynamicCache(tuple(layers)), suffix)


def rows_of_points(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Points (B, N, H, A) at times (N,) as rows (B * N, H, A), (B * N,)."""
    assert tau.shape == x.shape[1:2], (x.shape, tau.shape)
    return x.flatten(0, 1), tau.repeat(len(x))

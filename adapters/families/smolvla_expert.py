"""SmolVLA's action expert over a prefix that many points share.

The host walks through both transformers layer by layer and calls the parts of each; this is that
walk for the expert alone, with the host's own modules. Layers that attend to the prefix only (its
cross-attention) project the cached keys and values with the expert's weights: they do not depend on
the flow's state, so here they are projected once a path instead of once an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vla_trqam.adapters.families.prefix_attention import (
    KeysValues,
    Suffix,
    prefix_attention,
    visibility_bias,
)

ROPE_WAVELENGTH = 10_000.0
"""Of the host's ``apply_rope``."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (B * N or 1, 1, S, D / 2) each, float32."""


@dataclass(frozen=True)
class SharedLayer:
    """A layer of the expert.

    Attributes:
        module: the host's layer.
        prefix: the keys and values that it reads, float32 keys as the host multiplies them.
        sees_suffix: whether its tokens attend to each other as well.
    """

    module: Any
    prefix: KeysValues
    sees_suffix: bool


@dataclass(frozen=True)
class SharedPrefix:
    """What all points of an observation share.

    Attributes:
        layers: of the expert.
        bias: of the prefix's tokens, (B, 1, P), float32.
        suffix_bias: of the suffix's own, (S, S), causal.
        behind_prefix: rotation by the positions behind the prefix.
        from_zero: rotation by positions that start at zero, for attention to the prefix only.
    """

    layers: Sequence[SharedLayer]
    bias: Tensor
    suffix_bias: Tensor
    behind_prefix: Rotation
    from_zero: Rotation


def share_prefix(model: Any, cache: Any, valid: Tensor, length: int, points: int) -> SharedPrefix:
    """Prepares a prefix for evaluations at N points of every observation.

    Args:
        model: the host's ``SmolVLMWithExpertModel``.
        cache: the prefix's, of B observations.
        valid: its tokens that are no padding, (B, P).
        length: S, of the suffix.
        points: N.
    """
    suffix = torch.arange(length, device=valid.device)
    positions = valid.sum(dim=1, keepdim=True) + suffix
    width = model.vlm.config.text_config.head_dim
    cos, sin = _rotation(positions, width)
    return SharedPrefix(
        list(_shared_layers(model, cache)),
        visibility_bias(valid.unsqueeze(1), torch.float32),
        visibility_bias(suffix.unsqueeze(1) >= suffix, torch.float32),
        (cos.repeat_interleave(points, dim=0), sin.repeat_interleave(points, dim=0)),
        _rotation(suffix.unsqueeze(0), width),
    )


def _shared_layers(model: Any, cache: Any) -> Iterator[SharedLayer]:
    _, experts = model.get_model_layers([model.get_vlm_model().text_model, model.lm_expert])
    every = model.self_attn_every_n_layers
    for index, (expert, cached) in enumerate(zip(experts, cache.layers, strict=True)):
        crosses = "cross" in model.attention_mode and not (every > 0 and index % every == 0)
        # The host lets the suffix pass a layer without an expert.
        if expert is None:
            continue
        if crosses:
            yield SharedLayer(expert, _projected(expert.self_attn, cached), False)
        else:
            values = _joined(cached.values, expert.self_attn.v_proj)
            yield SharedLayer(expert, KeysValues(cached.keys.float(), values), True)


def _joined(values: Tensor, project: Any) -> Tensor:
    """The prefix's values in the precision that they have beside the suffix's own."""
    device = values.device.type
    own = project.weight.dtype
    if torch.is_autocast_enabled(device):
        own = torch.get_autocast_dtype(device)
    return values.to(torch.promote_types(values.dtype, own))


def _projected(attention: Any, cached: Any) -> KeysValues:
    """The prefix's keys and values through the expert's projections, (B, G, P, D)."""
    keys, values = (
        _heads(project(t.transpose(1, 2).flatten(2).to(project.weight.dtype)), attention.head_dim)
        for project, t in ((attention.k_proj, cached.keys), (attention.v_proj, cached.values))
    )
    return KeysValues(keys.float(), values)


def _heads(states: Tensor, width: int) -> Tensor:
    """(rows, L, heads * D) -> (rows, heads, L, D)."""
    return states.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotation(positions: Tensor, width: int) -> Rotation:
    """Of the host's ``apply_rope``: positions (B, S) -> (B, 1, S, D / 2), twice."""
    half = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    timescale = ROPE_WAVELENGTH ** ((2.0 / width) * half)
    radians = positions.unsqueeze(-1).to(torch.float32) / timescale
    return torch.cos(radians).unsqueeze(1), torch.sin(radians).unsqueeze(1)


def _rotated(states: Tensor, rotation: Rotation) -> Tensor:
    """(rows, heads, S, D) by position; float32 within, as in the host."""
    cos, sin = rotation
    first, second = states.to(torch.float32).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(states.dtype)


def expert_states(model: Any, suffix: Tensor, prefix: SharedPrefix) -> Tensor:
    """The expert's last states for embedded suffixes (B * N, S, W)."""
    hidden = suffix
    for layer in prefix.layers:
        module = layer.module
        attention = module.self_attn
        normed = module.input_layernorm(hidden).to(attention.q_proj.weight.dtype)
        attended = _attended(layer, normed, prefix).to(attention.o_proj.weight.dtype)
        out = attention.o_proj(attended)
        # The host adds in place: the stream has the layers' precision, not that of what enters it.
        hidden = (out + hidden).to(out.dtype)
        hidden = module.mlp(module.post_attention_layernorm(hidden)) + hidden
    return model.lm_expert.norm(hidden)


def _attended(layer: SharedLayer, normed: Tensor, prefix: SharedPrefix) -> Tensor:
    attention = layer.module.self_attn
    width = attention.head_dim
    query = _heads(attention.q_proj(normed), width)
    query = _rotated(query, prefix.behind_prefix if layer.sees_suffix else prefix.from_zero)
    suffix = None
    if layer.sees_suffix:
        keys = _rotated(_heads(attention.k_proj(normed), width), prefix.behind_prefix)
        values = _heads(attention.v_proj(normed), width)
        suffix = Suffix(keys.float(), values, prefix.suffix_bias)
    # The host multiplies queries and keys in float32.
    query = query.float() * width**-0.5
    return prefix_attention(query, layer.prefix, prefix.bias, suffix).flatten(2)

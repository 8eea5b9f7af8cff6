"""The Gemma action expert of pi0 and pi05 over a prefix that many points share.

The layers, their norms, projections and rotation are the host's own modules; only the attention
between them is :func:`~vla_trqam.adapters.families.prefix_attention.prefix_attention`, which
transformers calls by its registered name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from vla_trqam.adapters.families.prefix_attention import (
    KeysValues,
    Suffix,
    prefix_attention,
    visibility_bias,
)

ATTENTION = "vla_trqam_shared_prefix"


@dataclass(frozen=True)
class SharedPrefix:
    """What all points of an observation share.

    Attributes:
        layers: keys and values of the prefix in every layer.
        bias: of its tokens, (B, 1, P).
        suffix_bias: of the suffix's own, (S, S), or None where all are seen.
        rotation: cosines and sines of the suffix's positions, (B * N, S, D) each.
    """

    layers: Sequence[KeysValues]
    bias: Tensor
    suffix_bias: Tensor | None
    rotation: tuple[Tensor, Tensor]


def share_prefix(
    expert: Any, cache: Any, valid: Tensor, blocks: tuple[int, ...], points: int
) -> SharedPrefix:
    """Prepares a prefix for evaluations at N points of every observation.

    Args:
        expert: the host's Gemma model.
        cache: the prefix's, of B observations.
        valid: its tokens that are no padding, (B, P).
        blocks: lengths of the suffix's blocks; a token sees its own and the earlier ones.
        points: N.
    """
    layers = [KeysValues(layer.keys, layer.values) for layer in cache.layers]
    sample = layers[0].keys
    block = torch.tensor([i for i, length in enumerate(blocks) for _ in range(length)])
    block = block.to(valid.device)
    sees = block.unsqueeze(1) >= block
    positions = valid.sum(dim=1, keepdim=True) + torch.arange(len(block), device=valid.device)
    cos, sin = expert.rotary_emb(sample, positions)
    return SharedPrefix(
        layers,
        visibility_bias(valid.unsqueeze(1), sample.dtype),
        visibility_bias(sees, sample.dtype) if len(blocks) > 1 else None,
        (cos.repeat_interleave(points, dim=0), sin.repeat_interleave(points, dim=0)),
    )


def expert_states(
    expert: Any, suffix: Tensor, time_condition: Tensor | None, prefix: SharedPrefix
) -> Tensor:
    """The expert's last states.

    Args:
        expert: the host's Gemma model.
        suffix: the embedded suffixes, (B * N, S, W).
        time_condition: of its normalisation layers (pi05), (B * N, W).
        prefix: of the B observations.

    Returns:
        (B * N, S, W).
    """
    # As the host does: the embeddings are float32 in a model of bfloat16.
    hidden = suffix.to(expert.layers[0].self_attn.q_proj.weight.dtype)
    with _own_attention(expert.config):
        for layer in expert.layers:
            hidden = layer(
                hidden,
                position_embeddings=prefix.rotation,
                adarms_cond=time_condition,
                shared_prefix=prefix,
            )
    hidden, _ = expert.norm(hidden, time_condition)
    return hidden


@contextmanager
def _own_attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared_prefix: SharedPrefix,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the form that transformers calls; :class:`SharedPrefix` holds the masks."""
    assert attention_mask is None
    layer: Any = module.layer_idx
    suffix = Suffix(key, value, shared_prefix.suffix_bias)
    prefix = shared_prefix.layers[layer]
    return prefix_attention(query * scaling, prefix, shared_prefix.bias, suffix), None


AttentionInterface.register(ATTENTION, _attention)

"""Attention of many short suffixes on one long prefix, whose keys and values are never copied.

One update evaluates the fields at many points of the same observations. The host's own attention
copies an observation's cached keys and values for every evaluation, repeats them for every head
and joins them with the suffix's. Here the queries of all points and heads that read the same keys
are the rows of one matrix product with the cache as it is; scores of prefix and suffix meet in the
softmax. It is the same function of the same numbers, summed in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -2.3819763e38
"""Added to the scores of tokens that are not seen; representable in bfloat16."""


@dataclass(frozen=True)
class KeysValues:
    """What one layer reads of the prefix: keys and values, (B, G, P, D) each for G groups."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Suffix:
    """Keys and values of the suffixes themselves, (B * N, G, S, D) each.

    Attributes:
        keys, values: after the rotation by position.
        bias: added to their scores, (S, S); None where every token sees every other.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None


def visibility_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``seen`` (bool) is true, :data:`MASKED` elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, MASKED)


def prefix_attention(
    query: Tensor, prefix: KeysValues, prefix_bias: Tensor, suffix: Suffix | None
) -> Tensor:
    """``softmax(q k + bias) v`` over the prefix's tokens and then the suffix's own.

    Args:
        query: scaled, (B * N, heads, S, D): N points of each of B observations, the points of an
            observation one after the other; heads of a group one after the other.
        prefix: of the observations.
        prefix_bias: (B, 1, P), in the query's dtype.
        suffix: None for attention on the prefix alone.

    Returns:
        (B * N, S, heads, D).
    """
    rows, heads, length, width = query.shape
    batch, groups, prefix_length, _ = prefix.keys.shape
    points, per_group = rows // batch, heads // groups
    assert (batch * points, groups * per_group) == (rows, heads), (query.shape, prefix.keys.shape)
    sizes = batch, points, groups, per_group, length, width
    # All queries on the same keys are rows of one matrix.
    q = query.view(sizes).transpose(1, 2).reshape(batch * groups, -1, width)
    keys, values = (t.reshape(batch * groups, prefix_length, width) for t in _pair(prefix))
    bias = prefix_bias if groups == 1 else prefix_bias.repeat_interleave(groups, dim=0)
    scores = torch.baddbmm(bias, q, keys.mT)
    if suffix is None:
        out = torch.bmm(_weights(scores, values), values)
    else:
        by_point = batch * groups * points
        own_keys, own_values = (
            t.view(batch, points, groups, length, width).transpose(1, 2).flatten(0, 2)
            for t in _pair(suffix)
        )
        own = torch.bmm(q.view(by_point, -1, width), own_keys.mT).view(-1, length, length)
        if suffix.bias is not None:
            own = own + suffix.bias
        weights = _weights(torch.cat([scores, own.view(len(q), -1, length)], dim=-1), values)
        on_prefix, on_own = weights.split([prefix_length, length], dim=-1)
        out = torch.bmm(on_prefix, values).view(by_point, -1, width)
        out = torch.baddbmm(out, on_own.reshape(by_point, -1, length), own_values)
    out = out.view(batch, groups, points, per_group, length, width)
    return out.permute(0, 2, 4, 1, 3, 5).reshape(rows, length, heads, width)


def _pair(read: KeysValues | Suffix) -> tuple[Tensor, Tensor]:
    return read.keys, read.values


def _weights(scores: Tensor, values: Tensor) -> Tensor:
    """The softmax is float32 in the hosts."""
    return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)

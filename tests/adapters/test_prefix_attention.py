"""Attention on a shared prefix against the textbook's formula, one row and head at a time."""

import math

import pytest
import torch
from torch import Tensor
from vla_trqam.adapters.families.prefix_attention import (
    KeysValues,
    Suffix,
    prefix_attention,
    visibility_bias,
)

BATCH, PREFIX, LENGTH, WIDTH = 2, 7, 3, 4


def textbook(
    query: Tensor,
    prefix: KeysValues,
    seen: Tensor,
    suffix: Suffix | None,
    sees: Tensor,
    points: int,
) -> Tensor:
    """(B * N, S, heads, D), from sums over the tokens that are seen."""
    rows, heads, length, _ = query.shape
    per_group = heads // prefix.keys.shape[1]
    out = torch.empty(rows, length, heads, query.shape[-1], dtype=query.dtype)
    for r in range(rows):
        b = r // points
        for h in range(heads):
            g = h // per_group
            for s in range(length):
                pairs = [
                    (prefix.keys[b, g, t], prefix.values[b, g, t])
                    for t in range(prefix.keys.shape[2])
                    if seen[b, t]
                ]
                if suffix is not None:
                    pairs += [
                        (suffix.keys[r, g, t], suffix.values[r, g, t])
                        for t in range(length)
                        if sees[s, t]
                    ]
                weights = [math.exp(float(query[r, h, s] @ k)) for k, _ in pairs]
                values = [w * v for w, (_, v) in zip(weights, pairs, strict=True)]
                out[r, s, h] = torch.stack(values).sum(dim=0) / sum(weights)
    return out


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("own", [True, False])
def test_shared_attention_is_the_textbooks(points: int, heads: int, groups: int, own: bool) -> None:
    generator = torch.Generator().manual_seed(heads + groups)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = random(BATCH * points, heads, LENGTH, WIDTH)
    prefix = KeysValues(random(BATCH, groups, PREFIX, WIDTH), random(BATCH, groups, PREFIX, WIDTH))
    seen = torch.ones(BATCH, PREFIX, dtype=torch.bool)
    seen[1, 4:] = False
    sees = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    shape = (BATCH * points, groups, LENGTH, WIDTH)
    bias = visibility_bias(sees, query.dtype)
    suffix = Suffix(random(*shape), random(*shape), bias) if own else None
    found = prefix_attention(query, prefix, visibility_bias(seen.unsqueeze(1), query.dtype), suffix)
    expected = textbook(query, prefix, seen, suffix, sees, points)
    # The softmax itself is float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_masked_tokens_have_no_weight_at_all() -> None:
    query = torch.randn(1, 1, 1, WIDTH)
    prefix = KeysValues(torch.randn(1, 1, 2, WIDTH), torch.randn(1, 1, 2, WIDTH))
    bias = visibility_bias(torch.tensor([[[True, False]]]), torch.float32)
    found = prefix_attention(query, prefix, bias, None)
    assert torch.equal(found.flatten(), prefix.values[0, 0, 0])
    bias = visibility_bias(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert bool(torch.isfinite(bias).all())

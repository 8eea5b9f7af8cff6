"""What is looked at before anything moves: the loss, gradient norms and path KL of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_trqam.errors import DivergenceError
from vla_trqam.methods.parts.parallel import Ranks

Terms = tuple[Sequence[Tensor], Sequence[float]]
"""Scalars and their weights in a sum."""


def measured(ranks: Ranks, sums: Mapping[str, Terms]) -> dict[str, float]:
    """Weighted sums, averaged over ranks, which therefore go on or stop together.

    One transfer from the device, and one exchange between the ranks.

    Args:
        ranks: the processes of the update.
        sums: by what they are called in a sentence.
    """
    scalars = [scalar.detach() for terms, _ in sums.values() for scalar in terms]
    # The norm of no gradient at all is made on the host.
    values = iter(torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist())
    own = [sum(w * next(values) for w in weights) for _, weights in sums.values()]
    return dict(zip(sums, ranks.mean(own), strict=True))


def check_finite(found: Mapping[str, float], where: str = "") -> None:
    """Refuses what a step of the optimizer would carry into every weight.

    Args:
        found: by what they are called in a sentence.
        where: to follow the number, like "at lambda 3".

    Raises:
        DivergenceError: one is NaN or infinite.
    """
    for name, value in found.items():
        if not math.isfinite(value):
            raise DivergenceError(f"training has diverged: {name} is {value} {where}".rstrip())

"""The policy that acts as the running mean of the weights in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vla_trqam.critic import ema_update


class WeightAverage(nn.Module):
    """``average <- (1 - rate) average + rate weights``, and acting with it.

    Single updates move a policy to and fro; their mean moves where they agree (Polyak averaging).
    A young average is the plain mean of all weights so far, so that it forgets where it began.
    It is kept in float32 whatever the weights are of: in bfloat16 its small steps round to none.

    Args:
        trained: the weights in training, which are followed from where they are now.
        rate: of the mean.
    """

    def __init__(self, trained: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__()
        self._trained = tuple(trained)  # in a tuple: they are the policy's
        self._rate = rate
        self.weights = nn.ParameterList(
            nn.Parameter(_single(p).clone(), requires_grad=False) for p in self._trained
        )
        self.num_updates: Tensor
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self) -> None:
        """Once after every update of the weights in training."""
        self.num_updates += 1
        rate = max(self._rate, 1.0 / (int(self.num_updates) + 1))
        ema_update(self.weights, [_single(p) for p in self._trained], rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the average stands where the weights in training do."""
        with torch.no_grad():
            kept = [p.clone() for p in self._trained]
            torch._foreach_copy_(list(self._trained), list(self.weights))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self._trained), kept)


def _single(weight: Tensor) -> Tensor:
    """In float32 or what is finer."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))

"""What networks compute in: bfloat16 where a launcher says so, and what keeps its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def networks_precision(mixed: str, device: torch.device) -> AbstractContextManager[object]:
    """Networks compute in this inside.

    Args:
        mixed: "bf16", or "no" for the precision of their weights.
        device: where they are.
    """
    if mixed == "no":
        return nullcontext()
    # No cache: torch has handed a weight that was rounded without gradient, for sampling, to the
    # pass with gradient, which then gave it none.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products of float32 matrices keep ten bits of their factors inside (TF32), on a GPU.

    As ``lerobot-train`` and ``lerobot-eval`` set it for a whole process: the vision towers of pi0
    and pi05 are float32, and most of an observation's time without.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for what is computed where this tensor lies.

    Autocast rounds the factors of matrix products to bfloat16 and leaves sums as they are. A
    gradient written by hand would then mix dtypes, and a critic's values are differences that
    bfloat16's eight bits do not hold.
    """
    kind = tensor.device.type
    # Asked first: without autocast this costs nothing. The device "meta" has none.
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()

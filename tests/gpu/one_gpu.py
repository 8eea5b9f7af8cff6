"""The device of these tests, and what an update asks of an accelerator there."""

from types import SimpleNamespace
from typing import Any

import torch

CUDA = torch.device("cuda")


def accelerator(mixed_precision: str, device: torch.device = CUDA) -> Any:
    """What an update asks of an accelerator; a real one is a state of the whole process."""
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=device,
        mixed_precision=mixed_precision,
        distributed_type=SimpleNamespace(value="NO"),
    )

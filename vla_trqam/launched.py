"""What the launcher of a run's processes left in the environment."""

from __future__ import annotations

import os

import torch

PRECISION = "ACCELERATE_MIXED_PRECISION"
"""How accelerate's launcher hands its --mixed_precision on."""


def launched_processes() -> int:
    """How many processes the launcher started, on all machines."""
    # Clusters set WORLD_SIZE alone for programs that nothing has launched yet.
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def launched_here() -> int:
    """How many of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes()))


def launched_first() -> bool:
    """Whether this is the main one, before there is a :class:`Team`."""
    return launched_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def launcher() -> list[str]:
    """The command that starts as many processes as there are, before a recipe's name.

    ``-q`` keeps accelerate from printing a traceback of its own below a recipe's sentence.
    """
    count = launched_processes()
    precision = os.environ.get(PRECISION, "no")
    if count > 1 and not torch.accelerator.is_available():
        set_precision = [] if precision == "no" else ["env", f"{PRECISION}={precision}"]
        return [*set_precision, "torchrun", f"--nproc_per_node={count}"]
    flags: list[str] = []
    if count > 1:
        flags = ["--multi_gpu", f"--num_processes={count}"]
    elif torch.cuda.device_count() > 1:  # a process on each, unless it is told
        flags = ["--num_processes=1"]
    return ["accelerate", "launch", "-q", *flags] + (
        [] if precision == "no" else [f"--mixed_precision={precision}"]
    )

"""Numbers that are not finite: found before they are saved, and what becomes of the run."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

from vla_trqam.engine.folder.checkpoints import last_checkpoint
from vla_trqam.engine.folder.state import module_tensors, optimizer_tensors
from vla_trqam.errors import DivergenceError
from vla_trqam.launched import launcher
from vla_trqam.methods.base import Method

STEP_SHRINKS = 0.5
"""What the step sizes are multiplied by at a rollback."""
MOST_ROLLBACKS = 5
"""Of a run: a thirty-second of its step sizes that does not hold it is not the mistake."""
SMALLER = "--method.actor_lr, --method.critic_lr or --method.kl_budget"


def not_finite(method: Method) -> str | None:
    """The first weight, moment of the optimizer or number to save that is NaN or infinite."""
    numbers = {k: v for k, v in method.scalars().items() if not isinstance(v, str)}
    # Both before either is looked at: what is in parts, all processes put together.
    weights, moments = module_tensors(method), optimizer_tensors(method.optimizer)
    return (
        next((name for name, value in numbers.items() if not math.isfinite(value)), None)
        or _first(weights, "weight {}")
        or _first(moments, "the optimizer's {}")
    )


def _first(tensors: dict[str, Tensor], called: str) -> str | None:
    real = {name: value for name, value in tensors.items() if value.is_floating_point()}
    finite = dict.fromkeys(real, True)
    # Adam counts its steps on the host. One transfer a device, which waits for what it brings.
    for device in {value.device for value in real.values()}:
        there = [name for name, value in real.items() if value.device == device]
        flags = torch.stack([torch.isfinite(real[name]).all() for name in there])
        finite |= zip(there, flags.tolist(), strict=True)
    return next((called.format(name) for name, good in finite.items() if not good), None)


def smaller_factor(factor: float, error: DivergenceError) -> float:
    """What the step sizes are multiplied by after one more rollback.

    Raises:
        DivergenceError: there were enough of them.
    """
    if factor <= STEP_SHRINKS**MOST_ROLLBACKS:
        raise DivergenceError(
            f"{error}, after {MOST_ROLLBACKS} rollbacks and with {factor:g} of the step sizes"
        ) from error
    return factor * STEP_SHRINKS


def what_to_do(output_dir: Path | None, on_divergence: str) -> str:
    """The end of the sentence of a run that ends by a :class:`DivergenceError`."""
    checkpoint = None if output_dir is None else last_checkpoint(output_dir)
    if checkpoint is None:
        return f"there is no checkpoint to go back to: begin again with a smaller {SMALLER}"
    if on_divergence == "rollback":
        return f"begin a new run with a smaller {SMALLER}"
    program = shlex.join([*launcher(), sys.argv[0], "--resume=true", f"--output_dir={output_dir}"])
    return (
        f"the last good checkpoint is {checkpoint}: go on from it, with half the step sizes where "
        f"it diverges again, by: {program} --on_divergence=rollback"
    )

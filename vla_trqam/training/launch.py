"""What every recipe does around its work: the exit status, torch's threads, the critic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.policy import FlowPolicy
from vla_trqam.training.interruption import Interrupted, how_to_go_on
from vla_trqam.training.memory import keep_freed_memory
from vla_trqam.training.run_folder import CONFIG_NAME
from vla_trqam.training.settings import CriticConfig


class Settings(Protocol):
    """What the settings of every recipe have."""

    output_dir: Path | None
    seed: int
    num_threads: int | None


def exit_status[C: Settings](read: Callable[[], C], work: Callable[[C], None]) -> int:
    """Runs a recipe; what went wrong becomes one sentence and the status of the program.

    Args:
        read: the settings from the command line.
        work: the whole run.

    Returns:
        0, 1 for numbers that are not finite, 2 for a mistake of the user's, 130 when interrupted.
    """
    config = None
    try:
        config = read()
        work(config)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}; a smaller step size or budget may hold it", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        folder = None if config is None else config.output_dir
        begun = folder is not None and (folder / CONFIG_NAME).is_file()
        print(how_to_go_on(folder if begun else None, str(stop)), file=sys.stderr)
        return 130
    return 0


def prepare_torch(config: Settings) -> Accelerator:
    """Threads, memory and the seed of weights yet to be made; returns the launcher's settings.

    Raises:
        UserError: the launcher started several processes.
    """
    accelerator = Accelerator()
    if accelerator.num_processes != 1:
        raise UserError(
            f"accelerate started {accelerator.num_processes} processes; this recipe trains in one: "
            "add --num_processes=1"
        )
    # accelerate launch sets OMP_NUM_THREADS to 1 on its own; this is the owner of the number.
    torch.set_num_threads(config.num_threads or usable_cores())
    keep_freed_memory()
    torch.manual_seed(config.seed)
    return accelerator


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_critic(knobs: CriticConfig, policy: FlowPolicy, seed: int) -> Critic:
    """A fresh critic of a policy's executed chunks, on its device."""
    torch.manual_seed(seed)
    ensemble = CriticEnsemble(
        policy.feature_dim,
        policy.chunk_shape[0] * int(policy.action_mask.sum()),
        knobs.hidden_dims,
        knobs.ensemble_size,
        layer_norm=knobs.layer_norm,
    )
    critic = Critic(
        ensemble,
        pessimism=knobs.pessimism,
        adjoint_pessimism=knobs.adjoint_pessimism,
        target_rate=knobs.target_rate,
        clip_actions=knobs.clip_actions,
    )
    return critic.to(next(policy.parameters()).device)

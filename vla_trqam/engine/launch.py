"""What every recipe does around its work: the exit status, torch's threads, the critic."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from vla_trqam.config.settings import CriticConfig, RunSettings
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.engine.divergence import what_to_do
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.engine.processes.interruption import Interrupted, how_to_go_on, stops_as_ctrl_c
from vla_trqam.engine.processes.memory import keep_freed_memory
from vla_trqam.engine.processes.team import FailedElsewhereError, make_accelerator
from vla_trqam.errors import DivergenceError, UserError, one_line
from vla_trqam.kernel_choice import choose_kernels
from vla_trqam.launched import launched_first, launched_here, launched_processes
from vla_trqam.policy import FlowPolicy
from vla_trqam.report.provenance import allowed_cores

MAIN_ENDS_WITHIN = 20.0
"""Seconds in which the main process of a failed run removes what it began and tells why."""
FULL_DISK = os.strerror(errno.ENOSPC)


class Settings(Protocol):
    """What the settings of every recipe have."""

    output_dir: Path | None
    num_threads: int | None


def exit_status[C: Settings](read: Callable[[], C], work: Callable[[C], None]) -> int:
    """Runs a recipe; what went wrong becomes one sentence and the status of the program.

    Returns:
        0, 1 for numbers that are not finite, 2 for a mistake of the user's, 130 when interrupted.
    """
    config = None
    try:
        with stops_as_ctrl_c():
            config = read()
            work(config)
    except FailedElsewhereError:
        # The launcher stops all processes as soon as one ends, and the main one has yet to tell.
        time.sleep(MAIN_ENDS_WITHIN)
        return 2
    except UserError as error:
        # Every process reads the same settings.
        if config is not None or launched_first():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except DivergenceError as error:
        if not launched_first():
            time.sleep(MAIN_ENDS_WITHIN)
            return 1
        folder = None if config is None else config.output_dir
        choice = getattr(config, "on_divergence", "stop")
        print(f"error: {error}; {what_to_do(folder, choice)}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        if FULL_DISK not in str(error):
            raise
        sentence = f"error: {one_line(error)}; {_going_on(config, '')}"
        print(sentence, file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        if launched_first():
            print(_going_on(config, str(stop)), file=sys.stderr)
        return 130
    return 0


def _going_on(config: Settings | None, where: str) -> str:
    folder = None if config is None else config.output_dir
    begun = folder is not None and (folder / CONFIG_NAME).is_file()
    return how_to_go_on(folder if begun else None, where)


def prepare_torch(config: RunSettings, *, several: bool = False) -> Accelerator:
    """:func:`prepare_process`, the kernels, and the seed of weights yet to be made."""
    accelerator = prepare_process(config.num_threads, several=several)
    choose_kernels(config.kernels)
    torch.manual_seed(config.seed)
    return accelerator


def prepare_process(num_threads: int | None, *, several: bool = False) -> Accelerator:
    """Threads and memory; returns the launcher's settings.

    Raises:
        UserError: the launcher started several processes, and the recipe cannot.
    """
    count = launched_processes()
    if count != 1 and not several:
        raise UserError(
            f"the launcher started {count} processes; this recipe works in one: "
            "add --num_processes=1"
        )
    accelerator = make_accelerator()
    # accelerate launch sets OMP_NUM_THREADS to 1 on its own; this is the owner of the number.
    torch.set_num_threads(num_threads or usable_cores())
    keep_freed_memory()
    return accelerator


def own_device(flag: str, wanted: str | None, accelerator: Accelerator) -> torch.device:
    """The device of this process.

    Raises:
        UserError: it is not here.
    """
    own = accelerator.device
    # accelerate numbers the processes of a CPU; LeRobot knows no cpu:0.
    try:
        device = torch.device(wanted or ("cpu" if own.type == "cpu" else own))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--{flag}={wanted} is not here: {one_line(error)}") from None
    return device


def usable_cores() -> int:
    """The cores that this process may use: its share of the machine's, and at least one."""
    return max(1, allowed_cores() // launched_here())


def make_critic(knobs: CriticConfig, policy: FlowPolicy, seed: int) -> Critic:
    """A fresh critic of a policy's executed chunks, on its device."""
    torch.manual_seed(seed)
    ensemble = CriticEnsemble(
        policy.feature_dim,
        policy.executed_size,
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
        gradient_noise=knobs.gradient_noise,
    )
    return critic.to(next(policy.parameters()).device)

"""Make a file of scripted, mixed-quality demonstrations in robomimic's format.

Example::

    python recipes/make_robomimic_data.py --task=lift --episodes=200 --seed=0 --output=lift.hdf5
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vla_trqam.config.command_line import boolean, exit_status, flags_of
from vla_trqam.data.sources.robomimic.writer import RobomimicWriter
from vla_trqam.envs.robomimic.demonstrators.collect import collect
from vla_trqam.envs.robomimic.demonstrators.operators import operator_names
from vla_trqam.envs.robomimic.demonstrators.record import EpisodePlan
from vla_trqam.envs.robomimic.demonstrators.tasks import demo_task
from vla_trqam.envs.robomimic.env import env_meta_for
from vla_trqam.errors import UserError

_VALID_SHARE = 0.1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; an unknown one ends the program with one sentence."""
    parser = flags_of(__doc__)
    add = parser.add_argument
    add("--task", required=True, help="lift, can or square")
    add("--episodes", type=int, required=True)
    add("--seed", type=int, default=0, help="determines every episode of the file")
    add("--output", type=Path, required=True, help="the HDF5 file to make")
    add("--operators", default="mixed", help="mixed, better, okay, worse or one operator's name")
    help_on_workers = "processes; 0 plays in this one; the file is the same"
    add("--workers", type=int, default=2, help=help_on_workers)
    add("--states", default="all", choices=("all", "initial", "none"), help="simulator states kept")
    add("--next_obs", type=boolean, default=True, help="store next_obs too: true or false")
    add("--model_file", type=boolean, default=True, help="store the model's XML: true or false")
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    """Collect the episodes and write the file.

    Raises:
        UserError: an option is out of range, or the output exists.
    """
    task = demo_task(options.task)
    _check_at_least("episodes", options.episodes, 1)
    _check_at_least("workers", options.workers, 0)
    _check_at_least("seed", options.seed, 0)
    names = operator_names(options.operators)
    plans = [
        EpisodePlan(options.seed, i, names[i % len(names)], options.states, options.model_file)
        for i in range(options.episodes)
    ]
    writer = RobomimicWriter(
        options.output,
        env_meta_for(task.env_name),
        next_obs=options.next_obs,
        attributes={
            "command": _command(options),
            "seed": options.seed,
            "max_steps": task.max_steps,
        },
    )
    with writer:
        _fill(writer, options, plans)


def _fill(
    writer: RobomimicWriter, options: argparse.Namespace, plans: Sequence[EpisodePlan]
) -> None:
    start, successes, steps, demos = time.monotonic(), 0, 0, []
    with tqdm(total=len(plans), desc=options.task, unit="episode") as bar:
        for demonstration in collect(options.task, plans, options.workers):
            demos.append(writer.append(demonstration))
            successes += bool(demonstration.attributes["success"])
            steps += len(demonstration.actions)
            rate = steps / (time.monotonic() - start)
            bar.set_postfix_str(f"success {successes / len(demos):.0%}, {rate:.0f} steps/s")
            bar.update()
    _split(writer, demos, options.seed)


def _split(writer: RobomimicWriter, demos: Sequence[str], seed: int) -> None:
    """A tenth of the demonstrations for validation, the rest for training."""
    shuffled = np.random.default_rng(seed).permutation(len(demos))
    valid = set(shuffled[: round(_VALID_SHARE * len(demos))].tolist())
    for i, name in enumerate(demos):
        writer.add_to_mask("valid" if i in valid else "train", [name])


def _command(options: argparse.Namespace) -> str:
    """The command that makes this file again, without its folder and the number of workers."""
    flags = {**vars(options), "output": options.output.name}
    flags.pop("workers")
    text = " ".join(f"--{key}={_flag(value)}" for key, value in flags.items())
    return f"python recipes/make_robomimic_data.py {text}"


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return exit_status(lambda: make(parse(arguments)), "interrupted; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())

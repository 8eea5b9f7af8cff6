"""Do two checkouts train to the same bits? Short runs of the recipes in both, compared.

    python benchmarks/same_bits.py ../before .
    python benchmarks/same_bits.py ../before . --only lift pi0 --keep /tmp/runs

Each checkout runs with its own environment (``.venv``), one torch thread and the same flags: Lift
by the default and the full preset and by QAM, and the packed tiny pi0. Of every pair of runs the
weights, moments, lambda, random streams, replay, metrics and outcomes are compared; where all are
equal the command exits with 0, else it names what differs and exits with 1. Flags are given by the
former names, which both sides of the change of names know.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run_results.run_difference import run_differences

QUICK = ("--num_threads=1", "--eval.num_workers=1", "--eval.videos=0", "--eval.episodes=2")
SHORT = (*QUICK, "--eval.episodes_during_training=2", "--log_freq=5")
LIFT = ("--pretrain.steps=40", "--offline.base_episodes=2", "--offline.steps=20")
AUTHORS = ("--trqam.scheme=shifted_euler", "--policy.num_flow_steps=10")
ONLINE = ("--online.steps=10", "--online.updates_per_round=5", "--online.episodes_per_round=2")


@dataclass(frozen=True)
class Short:
    """A short run: its recipe, and its flags beside :data:`SHORT` and :data:`ONLINE`."""

    recipe: str
    flags: tuple[str, ...]


RUNS = {
    "lift": Short("finetune_robomimic", (*LIFT, *AUTHORS, "--evaluate_every=10")),
    "lift_full": Short(
        "finetune_robomimic",
        (*LIFT, *AUTHORS, "--preset=full", "--offline.critic_steps=20", "--evaluate_every=10"),
    ),
    "lift_qam": Short(
        "finetune_robomimic",
        (*LIFT, *AUTHORS, "--method.name=qam", "--method.inverse_temperature=3"),
    ),
    "lift_posterior": Short(
        "finetune_robomimic",
        (
            *(*LIFT, "--trqam.scheme=posterior", "--policy.num_flow_steps=10"),
            "--policy.tuned_flow_steps=3",
        ),
    ),
    "lift_training_base": Short(
        "finetune_robomimic",
        (*LIFT, *AUTHORS, "--trqam.train_base=true", "--trqam.shared_optimizer=true"),
    ),
    "pi0": Short(
        "finetune_pi0",
        (
            *("--base_episodes=2", "--critic.warmup_steps=20", "--steps=6", "--evaluate_every=6"),
            *("--trqam.scheme=posterior", "--policy.tuned_flow_steps=2", "--batch_size=32"),
        ),
    ),
    "pi0_shifted": Short(
        "finetune_pi0",
        (
            *("--base_episodes=2", "--critic.warmup_steps=20", "--steps=6", "--evaluate_every=0"),
            *("--trqam.scheme=shifted_euler", "--policy.tuned_flow_steps=5", "--batch_size=32"),
            "--micro_batches=2",
        ),
    ),
}


def command_of(run: Short, output_dir: Path) -> list[str]:
    """What a checkout is asked for, from its own folder."""
    recipe = f"recipes/{run.recipe}.py"
    return [
        *(".venv/bin/python", recipe, f"--output_dir={output_dir}"),
        *(*SHORT, *ONLINE, *run.flags),
    ]


def compare(checkouts: Sequence[Path], name: str, folder: Path) -> list[str]:
    """Makes the run in both checkouts; what differs, a line each."""
    folders = [folder / f"{name}_{place}" for place in ("one", "other")]
    for checkout, output_dir in zip(checkouts, folders, strict=True):
        done = subprocess.run(
            command_of(RUNS[name], output_dir),
            cwd=checkout,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            return [f"{checkout} did not finish {name}: {said[-1]}"]
    return run_differences(*folders)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 where all runs end alike to the bit, 1 where one does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs=2, help="folders, each with its own .venv")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", type=Path, help="an empty folder that the runs stay in")
    given = parser.parse_args(arguments)
    checkouts = [path.resolve() for path in given.checkouts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if given.keep is None else given.keep.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        differ = False
        for name in given.only:
            found = compare(checkouts, name, folder)
            differ |= bool(found)
            print("\n".join([f"{name}: differs", *found]) if found else f"{name}: the same bits")
            sys.stdout.flush()
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())

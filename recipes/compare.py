"""Compares methods on equal terms: methods, tasks and seeds in one command, one table.

python recipes/compare.py --preset=smoke
python recipes/compare.py --preset=claims_c4 --workers=2
python recipes/compare.py --config_path=my_study.yaml --methods=[trqam,fql] --seeds=[0,1,2,3]

The same command goes on after whatever ended it. See docs/compare.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vla_trqam.recipes.study_runs import exit_status, read_run

from vla_trqam.config.parsing import parse_config
from vla_trqam.study.comparison import write_comparison
from vla_trqam.study.plan import make_plan
from vla_trqam.study.run import STOPPED, work
from vla_trqam.study.settings import CompareConfig
from vla_trqam.study.trials import Trials, made_trials

PRESETS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: compare(parse_config(CompareConfig, PRESETS, given, preset="smoke")))


def compare(config: CompareConfig) -> int:
    """The whole study: the trials that find the knobs, then the runs that are compared."""
    # Before hours of trials: what is compared could work with the table's own knobs.
    make_plan(config, lambda task: Trials({}).variants_in(task, config.methods), read_run)
    trials = made_trials(config, read_run)
    if trials is None:
        return STOPPED
    return work(
        config,
        lambda task: trials.variants_in(task, config.methods),
        read_run,
        partial(write_comparison, trials=trials),
    )


if __name__ == "__main__":
    sys.exit(main())

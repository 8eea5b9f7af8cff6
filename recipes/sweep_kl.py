"""Sweeps the KL budget: success, realised KL, their order, and a budget to take.

python recipes/sweep_kl.py --preset=smoke
python recipes/sweep_kl.py --preset=claims_c3 --workers=2

The same command goes on after whatever ended it. See docs/compare.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vla_trqam.recipes.study_runs import exit_status, read_run

from vla_trqam.config.parsing import parse_config
from vla_trqam.study.plan import Variant
from vla_trqam.study.run import work
from vla_trqam.study.settings import SweepConfig
from vla_trqam.study.sweep import write_sweep

PRESETS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: sweep(parse_config(SweepConfig, PRESETS, given, preset="smoke")))


def sweep(config: SweepConfig) -> int:
    """The whole study."""
    return work(config, lambda _: variants_of(config), read_run, write_sweep)


def variants_of(config: SweepConfig) -> list[Variant]:
    """The method with each budget."""
    return [Variant(f"kl{b:g}", config.method, {"kl_budget": b}) for b in config.budgets]


if __name__ == "__main__":
    sys.exit(main())

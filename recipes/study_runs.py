"""The recipes whose runs a study can be made of, and how a study's own command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vla_trqam.recipes import finetune_ogbench, finetune_robomimic

from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.state_settings import FinetuneRobomimicConfig, StateRunConfig
from vla_trqam.errors import UserError
from vla_trqam.jobs import states

RECIPES = {
    "finetune_robomimic": (FinetuneRobomimicConfig, finetune_robomimic.PRESETS),
    "finetune_ogbench": (FinetuneOGBenchConfig, finetune_ogbench.PRESETS),
}


def read_run(recipe: str, flags: Sequence[str]) -> StateRunConfig:
    """The settings of a run, as its recipe reads them.

    Raises:
        UserError: there is no such recipe, or it refuses the flags.
    """
    if recipe not in RECIPES:
        raise UserError(f"{recipe} is no recipe of a study's runs; there are {', '.join(RECIPES)}")
    config_class, presets = RECIPES[recipe]
    return states.read_config(config_class, presets, flags)


def exit_status(work: Callable[[], int]) -> int:
    """Runs a study's command; what is wrong with it becomes one sentence."""
    try:
        return work()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

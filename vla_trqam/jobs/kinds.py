"""The kinds of runs there are: how a run's file tells its own, and which simulator it plays in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.parsing import read_settings, saved_config
from vla_trqam.config.settings import RunSettings
from vla_trqam.config.state_settings import FinetuneRobomimicConfig, StateRunConfig
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.sources.robomimic.hdf5 import read_action_size, read_env_args
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.ogbench.family import ogbench_family
from vla_trqam.envs.registry import make_family
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.jobs.robomimic_data import dataset_path
from vla_trqam.jobs.state_pins import take_dataset


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        settings: their class.
        has: whether a file with these sections is of it.
        family: its simulator, of settings and a limit of control steps; None for a run without.
        sees: what the settings choose of the states, in order; () where they choose nothing.
    """

    settings: type[RunSettings]
    has: Callable[[Collection[str]], bool]
    family: Callable[[Any, int], EnvFamily | None]
    sees: Callable[[Any], tuple[str, ...]] = lambda _: ()


def _of_lerobot(settings: FinetuneVLAConfig, steps: int) -> EnvFamily | None:
    if settings.env.type is None:
        return None
    return make_family(settings.env, max_episode_steps=steps)


def _of_ogbench(settings: FinetuneOGBenchConfig, steps: int) -> EnvFamily:
    return ogbench_family(settings.env.task, max_episode_steps=steps)


def _of_robomimic(settings: FinetuneRobomimicConfig, steps: int) -> EnvFamily:
    path = dataset_path(settings.dataset)
    return robomimic_family(
        read_env_args(path),
        max_episode_steps=steps,
        obs_keys=settings.dataset.obs_keys,
        action_size=read_action_size(path),
    )


KINDS = (
    Kind(FinetuneVLAConfig, lambda sections: "pretrain" not in sections, _of_lerobot),
    Kind(FinetuneOGBenchConfig, lambda sections: {"pretrain", "env"} <= {*sections}, _of_ogbench),
    Kind(
        FinetuneRobomimicConfig,
        lambda sections: "pretrain" in sections and "env" not in sections,
        _of_robomimic,
        lambda settings: tuple(settings.dataset.obs_keys),
    ),
)


def kind_of(settings: RunSettings) -> Kind:
    """That of a run's settings."""
    return next(kind for kind in KINDS if type(settings) is kind.settings)


def settings_of_run(run: Path) -> RunSettings:
    """What the ``config.yaml`` in a run's folder says, wherever it is asked from.

    Raises:
        UserError: it is damaged.
    """
    path = run / CONFIG_NAME
    sections = read_settings(path).keys()
    settings = saved_config(next(kind for kind in KINDS if kind.has(sections)).settings, path)
    if isinstance(settings, StateRunConfig):
        take_dataset(settings, run)
    return settings

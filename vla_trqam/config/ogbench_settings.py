"""The settings of a run on OGBench's states, beside those of every run on states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vla_trqam.config.methods import DEFAULT_TYPE, METHOD, SECTIONS, TYPE
from vla_trqam.config.state_settings import StateRunConfig
from vla_trqam.data.sampling import ShortChunks
from vla_trqam.envs.ogbench.domains import (
    DomainSetting,
    domain_of,
    preset_of_domains,
    settings_of_domain,
)
from vla_trqam.launched import launched_first
from vla_trqam.methods.bc import BehaviourCloningConfig
from vla_trqam.methods.registry import METHODS

OGBenchReward = Literal["success_minus_one", "sparse", "dense"]
"""Of the kinds of a reward; there is no column, as the data is relabelled for the task."""


@dataclass
class OGBenchTaskConfig:
    """The task.

    Attributes:
        task: OGBench's name of a single task with states; without -taskN, the domain's default one.
    """

    task: str = "pointmaze-medium-navigate-singletask-task1-v0"


@dataclass
class OGBenchDataConfig:
    """The replay's offline data.

    Attributes:
        path: an npz of OGBench's format, or a folder of them, which are read one after the other;
            null for the place where OGBench keeps the task's own.
        swap_every: updates with one file of a folder in memory before the next one's turn, for sets
            that are too large; null for all of them in the replay.
        reward: what the critic maximises: made of success, or OGBench's own ("dense"), which is
            minus the number of the task's parts that are not yet right.
        short_chunks: chunks that a solved state cuts short.
    """

    path: Path | None = None
    swap_every: int | None = None
    reward: OGBenchReward = "success_minus_one"
    short_chunks: ShortChunks = "pad"


@dataclass
class OGBenchCloningConfig:
    """Behaviour cloning of the base, of all of the data.

    Attributes:
        steps: updates.
        batch_size: chunks a batch.
        optimizer: its step size and averaging.
    """

    steps: int = 5000
    batch_size: int = 256
    optimizer: BehaviourCloningConfig = field(default_factory=BehaviourCloningConfig)


@dataclass
class FinetuneOGBenchConfig(StateRunConfig):
    """Every setting of the recipe; ``--preset`` names a section of finetune_ogbench.yaml.

    Attributes:
        env: the task.
    """

    dataset: OGBenchDataConfig = field(default_factory=OGBenchDataConfig)
    pretrain: OGBenchCloningConfig = field(default_factory=OGBenchCloningConfig)
    env: OGBenchTaskConfig = field(default_factory=OGBenchTaskConfig)

    @classmethod
    def between(
        cls, preset: str, settings: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The papers' settings of the task's domain, told in a line."""
        asked = {**settings, **flags}
        if preset != preset_of_domains() or not isinstance(asked.get("env.task"), str):
            return {}
        domain, method = domain_of(asked["env.task"]), str(asked.get(TYPE) or DEFAULT_TYPE)
        found = settings_of_domain(domain, {method} & METHODS.keys())
        if launched_first():
            own = f"{SECTIONS}.{method}.", f"{METHOD}."
            named = [replace(one, name=one.name.replace(*own)) for one in found]
            told = [one for one in named if one.name not in flags]
            print(f"preset {preset}, domain {domain}: {_told(told, any_known=bool(found))}")
        return {one.name: one.value for one in found}

    def _at_least_one(self) -> dict[str, int | None]:
        return super()._at_least_one() | {"dataset.swap_every": self.dataset.swap_every}


def _told(told: Sequence[DomainSetting], *, any_known: bool) -> str:
    """What a domain sets, and what of it no source says."""
    if not any_known:
        return "no paper has it; what the preset says stands"
    known = [f"{one.name}={one.value}" for one in told if one.known]
    guessed = [f"{one.name} is in no source: {one.value} stands" for one in told if not one.known]
    return "; ".join([", ".join(known), *guessed])

"""The settings of a run on OGBench's states, beside those of every run on states."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vla_trqam.config.state_settings import StateRunConfig
from vla_trqam.data.sampling import ShortChunks
from vla_trqam.methods.bc import BehaviourCloningConfig

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

    def _at_least_one(self) -> dict[str, int | None]:
        return super()._at_least_one() | {"dataset.swap_every": self.dataset.swap_every}

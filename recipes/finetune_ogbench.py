"""Makes a flow policy better in one of OGBench's single tasks: cloning, offline, online, report.

python recipes/make_ogbench_data.py --dataset=pointmaze-medium-navigate-v0 --output=maze.npz
accelerate launch -q recipes/finetune_ogbench.py --dataset.path=maze.npz
accelerate launch -q recipes/finetune_ogbench.py --preset=cube_single --dataset.path=cube.npz
accelerate launch -q recipes/finetune_ogbench.py --resume=true --output_dir=outputs/...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.data.sources.ogbench import (
    OGBenchData,
    OGBenchShards,
    data_path,
    read_ogbench,
    read_shards,
)
from vla_trqam.engine.folder.pins import Input
from vla_trqam.envs.ogbench.family import ogbench_family
from vla_trqam.jobs import states
from vla_trqam.jobs.states import PRETRAIN, InTurn, StateTask

PRESETS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return states.main(FinetuneOGBenchConfig, PRESETS, open_task, arguments)


def open_task(config: FinetuneOGBenchConfig) -> StateTask:
    """The task of the settings, and its data.

    Raises:
        UserError: OGBench is not installed or has no such task, or the data is not of it.
    """
    steps, dense = config.eval.max_episode_steps, config.dataset.reward == "dense"
    family = ogbench_family(config.env.task, max_episode_steps=steps, dense=dense)
    own = ogbench_family(config.env.task).max_episode_steps
    if own != steps:
        print(f"an episode is cut after {steps} steps, where OGBench cuts after {own}")
    every = config.dataset.swap_every
    path = data_path(config.dataset.path, config.env.task, sharded=every is not None)
    data: OGBenchData | OGBenchShards
    if every is None:
        data = seen = read_ogbench(path, config.env.task, dense=dense)
    else:
        data = read_shards(path, config.env.task, dense=dense)
        seen = data.first
    folder = path if path.is_dir() else path.parent
    return StateTask(
        name=config.env.task,
        data=Input("dataset", str(path), folder, tuple(file.name for file in data.files)),
        parts={PRETRAIN: data} if isinstance(data, OGBenchData) else {},
        moments=lambda: (seen.mean, seen.std),
        family=lambda: family,
        in_turn=InTurn(data, every) if isinstance(data, OGBenchShards) and every else None,
    )


if __name__ == "__main__":
    sys.exit(main())

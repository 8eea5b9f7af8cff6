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
from vla_trqam.data.sources.base import fill
from vla_trqam.data.sources.ogbench import data_path, read_ogbench
from vla_trqam.engine import state_runs
from vla_trqam.engine.folder.pins import Source
from vla_trqam.engine.launch import exit_status
from vla_trqam.engine.state_runs import StateTask
from vla_trqam.envs.ogbench.family import ogbench_family

PRESETS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: read_config(given), finetune)


def read_config(arguments: Sequence[str]) -> FinetuneOGBenchConfig:
    """The settings of a new run, or those of the run that is resumed."""
    return state_runs.read_config(FinetuneOGBenchConfig, PRESETS, arguments)


def finetune(config: FinetuneOGBenchConfig) -> None:
    """The whole run; see :func:`vla_trqam.engine.state_runs.finetune`."""
    state_runs.finetune(config, open_task)


def open_task(config: FinetuneOGBenchConfig) -> StateTask:
    """The task of the settings, and its data.

    Raises:
        UserError: OGBench is not installed or has no such task, or the data is not of it.
    """
    steps = config.eval.max_episode_steps
    family = ogbench_family(config.env.task, max_episode_steps=steps)
    own = ogbench_family(config.env.task).max_episode_steps
    if own != steps:
        print(f"an episode is cut after {steps} steps, where OGBench cuts after {own}")
    path = data_path(config.dataset.path, config.env.task)
    data = read_ogbench(path, config.env.task)
    folder = path if path.is_dir() else path.parent
    return StateTask(
        name=config.env.task,
        data=Source("dataset", str(path), folder, tuple(file.name for file in data.files)),
        observation_dim=data.observation_dim,
        action_dim=data.action_dim,
        num_steps=data.num_steps,
        moments=lambda: (data.mean, data.std),
        fill=lambda replay: fill(replay, data, "pretrain"),
        family=lambda: family,
    )


if __name__ == "__main__":
    sys.exit(main())

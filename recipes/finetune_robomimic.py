"""Makes a flow policy better in a Robomimic task: pretraining, offline and online TRQAM, report.

accelerate launch -q recipes/finetune_robomimic.py
accelerate launch -q recipes/finetune_robomimic.py --preset=full --dataset.path=can.hdf5
accelerate launch -q recipes/finetune_robomimic.py --resume=true --output_dir=outputs/...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.data.sources.robomimic.hdf5 import RobomimicFile
from vla_trqam.engine.folder.pins import Input
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.jobs import states
from vla_trqam.jobs.robomimic_data import parts_of, read_dataset
from vla_trqam.jobs.states import StateTask

PRESETS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return states.main(FinetuneRobomimicConfig, PRESETS, open_task, arguments)


def open_task(config: FinetuneRobomimicConfig) -> StateTask:
    """The file of the settings, and the task that it was recorded in.

    Raises:
        UserError: it cannot be trained on.
    """
    file = read_dataset(config.dataset)
    return StateTask(
        name=file.env_args["env_name"],
        data=Input("dataset", str(file.path), file.path.parent, (file.path.name,)),
        parts=parts_of(config, file),
        moments=partial(_moments, file),
        family=partial(
            robomimic_family,
            file.env_args,
            max_episode_steps=config.eval.max_episode_steps,
            obs_keys=config.dataset.obs_keys,
            action_size=file.action_dim,
        ),
    )


def _moments(file: RobomimicFile) -> tuple[np.ndarray, np.ndarray]:
    observations = np.concatenate([demo.observations for demo in file.demos])
    return observations.mean(axis=0), observations.std(axis=0)


if __name__ == "__main__":
    sys.exit(main())

"""A Robomimic run's offline data: the file that the settings name, put into the replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vla_trqam.data
from vla_trqam.config.state_settings import DatasetConfig, FinetuneRobomimicConfig
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.robomimic.hdf5 import (
    RobomimicFile,
    read_robomimic,
    require_env_version,
)
from vla_trqam.data.sources.robomimic.official import download_official
from vla_trqam.envs.robomimic.env_meta import check_env_meta
from vla_trqam.errors import UserError

PACKED = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")


def dataset_path(data: DatasetConfig) -> Path:
    """The HDF5 file that the settings name, downloaded where it is an official one."""
    return download_official(data.name) if data.name else data.path or PACKED


def read_dataset(data: DatasetConfig) -> RobomimicFile:
    """The file of the settings, read and checked.

    Raises:
        UserError: the simulator cannot act on it, or the reward is not that of its demos.
    """
    path = dataset_path(data)
    file = read_robomimic(path, obs_keys=data.obs_keys, filter_key=data.filter_key)
    require_env_version(file)
    try:
        check_env_meta(file.env_args)
        RewardSpec(data.reward).apply(np.concatenate([demo.rewards for demo in file.demos]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return file


def pretraining_demos(config: FinetuneRobomimicConfig, file: RobomimicFile) -> list[str]:
    """The demos that the base is cloned from; none when it comes from a checkpoint.

    Raises:
        UserError: the settings select none, or more than there are.
    """
    if config.policy.path is not None:
        return []
    key = config.pretrain.filter_key
    names = [demo.name for demo in file.demos if key is None or key in demo.filter_keys]
    if not names:
        known = sorted({key for demo in file.demos for key in demo.filter_keys})
        raise UserError(
            f"--pretrain.filter_key={key} selects no demo of {file.path}; "
            f"there are {', '.join(known) or 'no filter keys'}; null takes all demos"
        )
    count = config.pretrain.num_demos
    if count is not None and count > len(names):
        raise UserError(
            f"--pretrain.num_demos={count} wants more demos than the {len(names)} of {file.path}"
        )
    return names[:count]


def parts_of(config: FinetuneRobomimicConfig, file: RobomimicFile) -> dict[str, RobomimicFile]:
    """All demos by the name that they get in the replay; those to clone have one of their own.

    Raises:
        UserError: see :func:`pretraining_demos`; or fewer than ``dataset.num_demos`` are left.
    """
    cloned = set(pretraining_demos(config, file))
    rest = [demo.name for demo in file.demos if demo.name not in cloned]
    names = {
        "pretrain": [demo.name for demo in file.demos if demo.name in cloned],
        "dataset": _spread(rest, config.dataset.num_demos, file),
    }
    return {part: file.select(chosen) for part, chosen in names.items() if chosen}


def _spread(names: list[str], count: int | None, file: RobomimicFile) -> list[str]:
    """So many of them from the first to the last: the operators of a file follow one another."""
    if count is None:
        return names
    if count > len(names):
        raise UserError(
            f"--dataset.num_demos={count} wants more demos than the {len(names)} of {file.path} "
            "that are not cloned"
        )
    return [names[len(names) * i // count] for i in range(count)]

"""A part of the demonstrations for the critic; the base is cloned from the same ones as ever."""

import pytest

from vla_trqam.config.state_settings import (
    DatasetConfig,
    FinetuneRobomimicConfig,
    PretrainConfig,
)
from vla_trqam.data.sources.robomimic.hdf5 import RobomimicFile
from vla_trqam.errors import UserError
from vla_trqam.jobs.robomimic_data import parts_of, read_dataset


@pytest.fixture(scope="module")
def lift() -> RobomimicFile:
    return read_dataset(DatasetConfig())


def names_of(file: RobomimicFile, count: int | None) -> dict[str, list[str]]:
    config = FinetuneRobomimicConfig(
        dataset=DatasetConfig(num_demos=count),
        pretrain=PretrainConfig(filter_key="worse_successful", num_demos=20),
    )
    parts = parts_of(config, file)
    return {name: [demo.name for demo in part.demos] for name, part in parts.items()}


def test_so_many_demos_are_spread_over_the_file(lift: RobomimicFile) -> None:
    every, tenth = names_of(lift, None), names_of(lift, 18)
    assert tenth["pretrain"] == every["pretrain"]
    assert len(every["dataset"]) == 180
    assert tenth["dataset"] == every["dataset"][::10]
    assert names_of(lift, 180) == every


def test_more_demos_than_there_are_left_are_refused(lift: RobomimicFile) -> None:
    said = r"^--dataset\.num_demos=181 wants more demos than the 180 of .* that are not cloned$"
    with pytest.raises(UserError, match=said):
        names_of(lift, 181)
    with pytest.raises(UserError, match=r"--dataset\.num_demos=0 must be at least 1"):
        names_of(lift, 0)

"""Sources of episodes keep the contract; OGBench's does so in `test_ogbench_npz`."""

from pathlib import Path

import pytest

from vla_trqam.data.sources.base import Source
from vla_trqam.data.sources.robomimic.hdf5 import read_robomimic

from .lerobot_files import LENGTH, Written, open_dataset
from .robomimic_files import write_mg
from .source_contract import SourceContract


class TestRobomimic(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return read_robomimic(write_mg(tmp_path / "mg.hdf5"))


class TestLeRobot(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        ends = [frame == LENGTH - 1 for _ in range(4) for frame in range(LENGTH)]
        success = [end and row > LENGTH for row, end in enumerate(ends)]
        extra = {"next.success": ("bool", success), "next.done": ("bool", ends)}
        written = Written(images=("front",), extra=extra)
        return open_dataset(written.write(tmp_path / "set"), reward="success")

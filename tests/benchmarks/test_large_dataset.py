"""The dataset that the benchmark repeats is one that a run reads, frame by frame."""

from pathlib import Path

import large_dataset
import numpy as np
import pytest

from vla_trqam.data.sources.lerobot.lending import LentPictures
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader

pytestmark = pytest.mark.slow


def test_a_repeated_dataset_shows_the_same_pictures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_dataset, "EPISODES", 2)
    large_dataset.write_filmed(tmp_path / "one", episodes=2, length=6)
    large_dataset.repeat(tmp_path / "one", tmp_path / "three", 3)
    one, three = (
        LeRobotReader(LeRobotConfig("local/large", tmp_path / name)) for name in ("one", "three")
    )
    assert (three.num_episodes, three.num_rows) == (6, 3 * one.num_rows)
    small, large = (LentPictures([reader], threads=1) for reader in (one, three))
    shown = small.pictures(large_dataset.CAMERAS, np.arange(12))
    again = large.pictures(large_dataset.CAMERAS, np.arange(24, 36))
    for camera in large_dataset.CAMERAS:
        assert np.array_equal(again[camera], shown[camera])
        assert shown[camera].std() > 0
    rewards = np.concatenate([episode.rewards for episode in three.without_pictures().episodes()])
    assert np.flatnonzero(rewards).tolist() == [5, 17, 29]

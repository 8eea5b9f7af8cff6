"""Folders that were written when a replay with images was a class of its own (revision da7556b)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.replay import Replay

from .raw_frames import CAMERAS, frame_episode

FORMER = Path(__file__).with_name("former_replays")


@pytest.fixture
def former(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(FORMER / request.param, tmp_path / "replay"))


@pytest.mark.parametrize("former", ["states"], indirect=True)
def test_a_former_replay_of_states_opens_and_goes_on(former: Path) -> None:
    replay = Replay.open(former)
    assert np.array_equal(replay.observations[:, 1], [1] * 4 + [2] * 3)
    assert np.array_equal(replay.actions[:, 0], [0.5] * 3 + [1.5] * 2)
    assert replay.rewards.tolist() == [0, 0, 1, 0, 0]
    episodes = replay.episodes()
    assert episodes.source.tolist() == ["pretrain", "online"]
    assert episodes.terminated.tolist() == episodes.success.tolist() == [True, False]
    assert (replay.cameras, replay.columns) == ({}, {})
    replay.grow(20)
    replay.truncate_to(1)
    assert Replay.open(former).num_steps == 3


@pytest.mark.parametrize("former", ["frames"], indirect=True)
def test_a_former_replay_of_images_opens_and_goes_on(former: Path) -> None:
    first = frame_episode(0, 4, terminated=True, every=2, final=False)
    second = frame_episode(1, 3, terminated=False, task="put the can")
    third = frame_episode(2, 3, terminated=True, task="another")
    replay = Replay.open(former)
    replay.grow(20, 30)
    replay.add(third, source="online")
    episodes = [first, second, third]
    for camera in CAMERAS:
        images = np.concatenate([e.images[camera] for e in episodes])
        assert np.array_equal(replay.images(camera), images)
    states = np.concatenate([e.observations for e in episodes])
    assert np.array_equal(replay.observations, states)
    assert replay.task_of_episodes() == ["lift the cube", "put the can", "another"]
    assert replay.episodes().source.tolist() == ["dataset", "online", "online"]

    def total(seen: dict[str, object]) -> dict[str, torch.Tensor]:
        return {"sum": torch.as_tensor(seen["observation.state"]).sum(1, keepdim=True)}

    cache = FeatureCache(replay, total, fingerprint="old")
    assert cache.update() == 4  # those of the third episode alone
    assert np.allclose(cache.at(np.arange(5, 9))["sum"][:, 0], states[5:9].sum(1), atol=1e-6)

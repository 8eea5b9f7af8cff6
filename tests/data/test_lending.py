"""Frames that stay in their dataset: whatever is asked for is what a copy would hold."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.base import create_replay
from vla_trqam.data.sources.lerobot import pictures
from vla_trqam.data.sources.lerobot.lending import LentPictures
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets
from vla_trqam.data.sources.lerobot.source import LeRobotReader
from vla_trqam.errors import UserError

from .lerobot_files import SIDE, Written, open_dataset

CAMERA = "front"


def readers_of(folder: Path) -> list[LeRobotReader]:
    """Two datasets of three and two episodes."""
    found = []
    for name, episodes in (("one", (0, 1, 2)), ("two", (3, 4))):
        key = f"observation.images.{CAMERA}"
        Written(episodes=episodes, videos=[key]).write(folder / name)
        found.append(open_dataset(folder / name, reward="terminal_success"))
    return found


def filled(folder: Path, readers: Sequence[LeRobotReader], *, lent: bool, more: int = 0) -> Replay:
    lender = LentPictures(readers, threads=2) if lent else None
    count = 0 if lender is None else lender.num_frames
    replay = create_replay(folder, readers, lent_frames=count, more_steps=more, more_frames=more)
    if lender is not None:
        replay.borrow(lender)
    named = {f"source_{number}": reader for number, reader in enumerate(readers)}
    LeRobotDatasets(named).fill(replay, lambda _: None, copies=not lent)
    return replay


def test_frames_in_any_order_are_those_of_a_copy(tmp_path: Path) -> None:
    readers = readers_of(tmp_path)
    copy, lent = (filled(tmp_path / f"replay_{k}", readers, lent=k) for k in (False, True))
    assert lent.num_frames == copy.num_frames
    for seed in range(5):
        frames = np.random.default_rng(seed).integers(copy.num_frames, size=9)
        found = lent.pictures(CAMERA, frames)
        assert found.shape == (9, SIDE, SIDE, 3)
        assert np.array_equal(found, copy.pictures(CAMERA, frames))
    everything = np.arange(copy.num_frames)
    assert np.array_equal(lent.pictures(CAMERA, everything), copy.images(CAMERA))


def test_lent_frames_and_those_of_later_episodes_come_in_one_batch(tmp_path: Path) -> None:
    readers = readers_of(tmp_path)
    copy, lent = (filled(tmp_path / f"replay_{k}", readers, lent=k, more=50) for k in (False, True))
    first_own = lent.num_frames
    later = readers[1].episode(0)
    darker = {CAMERA: np.stack([255 - picture for picture in later.images[CAMERA]])}
    for replay in (copy, lent):
        replay.add(replace(later, images=darker), source="online")
    frames = np.random.default_rng(0).permutation(copy.num_frames)
    assert (frames[:12] < first_own).any()
    assert (frames[:12] >= first_own).any()
    for some in (frames[:12], frames[frames >= first_own]):
        assert np.array_equal(lent.pictures(CAMERA, some), copy.images(CAMERA)[some])


def test_nothing_is_decoded_until_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = readers_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode_video", None)
        replay = filled(tmp_path / "replay", readers, lent=True)
    assert replay.num_episodes == 5
    assert replay.num_frames > 0
    assert not replay.images(CAMERA).any()


def test_other_datasets_than_it_was_filled_from_are_refused(tmp_path: Path) -> None:
    readers = readers_of(tmp_path)
    filled(tmp_path / "replay", readers, lent=True).close()
    again = Replay.open(tmp_path / "replay")
    with pytest.raises(UserError, match="are they the same"):
        again.borrow(LentPictures(readers[:1], threads=1))
    with pytest.raises(UserError, match="lie in the datasets"):
        again.pictures(CAMERA, np.array([0]))


def test_an_episode_with_pictures_of_its_own_is_refused_among_them(tmp_path: Path) -> None:
    readers = readers_of(tmp_path)
    lender = LentPictures(readers, threads=1)
    replay = create_replay(tmp_path / "replay", readers, lent_frames=lender.num_frames)
    with pytest.raises(UserError, match="pictures of 1 cameras; the first"):
        replay.add(readers[0].episode(0), source="dataset")


def test_pictures_held_by_tables_are_refused(tmp_path: Path) -> None:
    Written(images=[f"observation.images.{CAMERA}"]).write(tmp_path / "data")
    reader = open_dataset(tmp_path / "data", reward="terminal_success")
    with pytest.raises(UserError, match="a whole block is read for one"):
        LentPictures([reader], threads=1)

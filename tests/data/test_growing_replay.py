"""A replay that is given more room keeps what it has, at whatever moment a kill comes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.frame_files import FrameHeader
from vla_trqam.data.replay import Replay
from vla_trqam.data.replay_files import Column, Header
from vla_trqam.errors import UserError

from .raw_frames import ACTION_DIM, CAMERAS, STATE_DIM, frame_episode

FIRST, SECOND = frame_episode(0, 7, terminated=True), frame_episode(1, 9, terminated=False)
SMALL, LARGE = {"capacity": 10, "frame_capacity": 12}, {"capacity": 5000, "frame_capacity": 3000}


class Killed(BaseException):
    pass


def create(path: Path, **sizes: int) -> Replay:
    replay = Replay.create(
        path, observation_dim=STATE_DIM, action_dim=ACTION_DIM, cameras=CAMERAS, **sizes
    )
    replay.add(FIRST, source="demonstrations")
    return replay


def cache_of(replay: Replay) -> FeatureCache:
    return FeatureCache(
        replay, lambda seen: {"sum": torch.as_tensor(seen["observation.state"])}, fingerprint="x"
    )


def contents(folder: Path) -> dict[str, Any]:
    arrays = {path.name: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    found = {name: (a.shape, a.dtype, a.tobytes()) for name, a in arrays.items()}
    return found | {path.name: path.read_text() for path in folder.glob("*.json")}


def test_a_grown_replay_is_the_one_that_was_large_from_the_start(tmp_path: Path) -> None:
    grown, large = create(tmp_path / "grown", **SMALL), create(tmp_path / "large", **LARGE)
    for replay in (grown, large):
        assert cache_of(replay).update() == 8
    with pytest.raises(UserError, match="is full"):
        grown.add(SECOND, source="online")
    grown.grow(**LARGE)
    for replay in (grown, large):
        cache = cache_of(replay)
        assert cache.num_frames == 8
        replay.add(SECOND, source="online")
        assert cache.update() == 10
        replay.close()
    assert contents(tmp_path / "grown") == contents(tmp_path / "large")
    reopened = Replay.open(tmp_path / "grown")
    assert (reopened.capacity, reopened.frame_capacity) == (5000, 3000)


def test_a_smaller_number_changes_nothing(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay", **LARGE)
    before = contents(tmp_path / "replay")
    replay.grow(**SMALL)
    assert contents(tmp_path / "replay") == before


def test_rows_that_are_never_written_take_no_space(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay", **SMALL)
    replay.grow(10_000_000, 10_000_000)
    assert sum(path.stat().st_blocks * 512 for path in replay.path.iterdir()) < 1_000_000


def test_a_kill_while_it_grows_leaves_a_replay_that_opens_and_grows(tmp_path: Path) -> None:
    replay = create(tmp_path / "large", **LARGE)
    cache_of(replay).update()
    replay.close()
    for number in itertools.count():
        folder = tmp_path / str(number)
        replay = create(folder, **SMALL)
        cache_of(replay).update()
        finished = dies_while_growing(replay, number)
        replay.close()
        again = Replay.open(folder)
        assert again.num_episodes == 1
        assert np.array_equal(again.actions, FIRST.actions)
        assert cache_of(again).num_frames == 8
        again.grow(**LARGE)
        again.close()
        assert contents(folder) == contents(tmp_path / "large")
        if finished:
            break
    assert number == len(list((tmp_path / "large").glob("*.npy"))) + 2


def dies_while_growing(replay: Replay, number: int) -> bool:
    """Whether the replay had grown before the n-th step of it, counted from 0."""
    steps = itertools.count()

    def mortal(function: Any) -> Any:
        def step(*arguments: Any) -> Any:
            if next(steps) == number:
                raise Killed
            return function(*arguments)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Column, "extend", staticmethod(mortal(Column.extend)))
        for header in (Header, FrameHeader):
            patch.setattr(header, "write", mortal(header.write))
        try:
            replay.grow(**LARGE)
        except Killed:
            return False
    return True


def test_a_file_whose_header_is_full_is_refused(tmp_path: Path) -> None:
    replay = Replay.create(tmp_path / "r", observation_dim=1, action_dim=1, capacity=9)
    path = tmp_path / "r" / "rewards.npy"
    values = np.load(path, allow_pickle=False)
    # As numpy wrote it before it left room: the header ends at the next multiple of 16.
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }".ljust(69) + b"\n"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    path.write_bytes(head + text + values.tobytes())
    with pytest.raises(UserError, match=r"rewards\.npy cannot be given 90 rows"):
        replay.grow(90)

"""Sets in files of one size, of which one at a time is in memory."""

import os
from pathlib import Path

import numpy as np
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.data.sources.ogbench import data_path, read_ogbench, read_shards
from vla_trqam.data.union import UnionSampler
from vla_trqam.data.window import Window
from vla_trqam.errors import UserError

from .test_ogbench_npz import MAZE, maze_rows, put, replaced, saved, without

CHUNKS = {
    "chunk_length": 3,
    "discount": 0.9,
    "short_chunks": "pad",
    "reward": RewardSpec("success_minus_one"),
}


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        saved(tmp_path / "data", f"pointmaze-medium-navigate-v0-00{number}", maze_rows(number))
    return tmp_path / "data"


def every_chunk(sampler):
    batch = sampler.gather(np.arange(sampler.num_starts))
    parts = batch.observation, batch.action.flatten(1), batch.next_observation
    numbers = batch.chunk_return, batch.discount, batch.terminated, batch.truncated
    return np.column_stack([*map(np.asarray, parts), *map(np.asarray, numbers)])


def filled(folder, path):
    data = read_ogbench(folder, MAZE)
    replay = create_replay(path, [data])
    fill(replay, data, "pretrain", say=lambda line: None)
    return replay


def test_half_a_file_that_a_killed_copy_left_is_none_of_them(folder):
    (folder / ".part.pointmaze-medium-navigate-v0-003.npz").write_bytes(b"half")
    assert len(read_shards(folder, MAZE).files) == len(list(folder.glob("point*[0-9].npz")))


def test_the_files_in_turn_have_the_chunks_of_them_all(folder, tmp_path):
    window = Window(read_shards(folder, MAZE), "pretrain")
    sampler, found = window.sampler(**CHUNKS), []
    for turn in range(3):
        window.turn_to(turn)
        found.append(every_chunk(sampler))
    whole = every_chunk(filled(folder, tmp_path / "replay").sampler(**CHUNKS))
    np.testing.assert_array_equal(np.concatenate(found), whole)
    window.turn_to(4)
    np.testing.assert_array_equal(every_chunk(sampler), found[1])


def test_one_file_in_turn_is_drawn_from_as_from_a_replay_of_it(folder, tmp_path):
    file = folder / "pointmaze-medium-navigate-v0-001.npz"
    window = Window(read_shards(file, MAZE, dense=True), "pretrain")
    replay = filled(file, tmp_path / "replay")
    reward = CHUNKS | {"reward": RewardSpec("dense")}
    shown, stored = window.sampler(**reward), replay.sampler(**CHUNKS)
    for _ in range(3):
        one, other = (s.sample(16, np.random.default_rng(7)) for s in (shown, stored))
        for name in ("observation", "action", "next_observation", "chunk_return", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    index = np.arange(shown.num_starts)
    for one, other in zip(shown.outcomes(index), stored.outcomes(index), strict=True):
        np.testing.assert_array_equal(one, other)
    assert window.stats.by_source["pretrain"].steps == 90


def test_files_in_turn_and_rollouts_are_drawn_from_alike(folder, tmp_path):
    """By the number of their chunks, and rollouts that are added later are seen."""
    window = Window(read_shards(folder, MAZE), "pretrain")
    replay = Replay.create(tmp_path / "replay", observation_dim=2, action_dim=2, capacity=400)
    union = UnionSampler([window.sampler(**CHUNKS), replay.sampler(**CHUNKS)])
    shown = union.num_starts
    np.testing.assert_array_equal(every_chunk(union), every_chunk(window.sampler(**CHUNKS)))
    fill(replay, read_ogbench(folder, MAZE), "online", say=lambda line: None)
    rolled_out = every_chunk(replay.sampler(**CHUNKS))
    assert union.num_starts == shown + len(rolled_out)
    np.testing.assert_array_equal(every_chunk(union)[shown:], rolled_out)
    drawn = union.sample(20_000, np.random.default_rng(0))
    first = every_chunk(window.sampler(**CHUNKS))[:, :2]
    share = (np.asarray(drawn.observation)[:, None] == first[:40]).all(-1).any(-1).mean()
    expected = 40 * 2 / union.num_starts  # the first file's chunks are in the replay as well
    assert abs(share - expected) < 0.02
    assert [len(part) for part in union.outcomes(np.array([0, shown]))] == [2, 2]


def test_memory_is_that_of_one_file_however_many_there_are(tmp_path):
    rows = maze_rows(trajectories=600, steps=1000)
    size = sum(rows[name].nbytes for name in ("observations", "actions", "terminals", "qpos"))
    first = tmp_path / "data/part-00.npz"
    first.parent.mkdir()
    np.savez(first, **rows)
    for number in range(1, 8):
        os.link(first, first.with_name(f"part-{number:02d}.npz"))
    window = Window(read_shards(first.parent, MAZE), "pretrain")
    sampler, held = window.sampler(**CHUNKS), []
    for turn in range(24):
        window.turn_to(turn)
        sampler.sample(8, np.random.default_rng(0))
        held.append(resident())
    # What a process keeps of memory that was freed differs from one turn to the next by a file or
    # two; files that were held would be 16 more.
    assert max(held[16:]) - max(held[:8]) < 6 * size, "each file more would be that much more"


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rewritten(folder, number, change):
    rows = maze_rows(number)
    change(rows)
    np.savez(folder / f"pointmaze-medium-navigate-v0-00{number}.npz", **rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("actions"), "has no array 'actions'"),
        (without("qpos"), "has no array 'qpos', which OGBench's data has; OGBench relabels"),
        (replaced("actions", lambda a: a[:-1]), "has 92 rows of actions and 93 of terminals"),
        (replaced("qpos", lambda q: np.hstack([q, q])), "has qpos of 4 numbers and .*000.npz of 2"),
        (lambda rows: rows.update(maze_rows(steps=20)), r"has 63 states and .*000\.npz 93: files"),
        (replaced("terminals", lambda t: np.array(True)), "has 93 rows of .* and 0 of terminals"),
    ],
)
def test_a_file_unlike_the_first_is_refused_before_it_is_read(change, message, folder):
    rewritten(folder, 2, change)
    with pytest.raises(UserError, match=rf"002\.npz {message}"):
        read_shards(folder, MAZE)


def test_what_is_no_npz_is_refused(folder):
    (folder / "zzz.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"zzz\.npz cannot be read as OGBench's npz"):
        read_shards(folder, MAZE)


def test_what_a_file_holds_is_checked_when_its_turn_comes(folder):
    rewritten(folder, 2, put("observations", 4, np.nan))
    window = Window(read_shards(folder, MAZE), "pretrain")
    window.turn_to(1)
    with pytest.raises(UserError, match=r"002\.npz has a NaN or infinite number in row 4"):
        window.turn_to(2)


def test_the_notes_say_what_is_not_known_yet(folder):
    (note,) = read_shards(folder, MAZE).notes()
    assert note.startswith("3 files of 93 states, one in memory at a time")
    assert "3 trajectories in pointmaze-medium-navigate-v0-000.npz, 90 steps" in note


def test_without_a_path_files_in_turn_are_ogbenchs_largest_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".ogbench/data/cube-double-play-100m-v0"
    with pytest.raises(UserError, match=r"100m-v0, where .* --shards=10"):
        data_path(None, "cube-double-play-singletask-task2-v0", sharded=True)
    own.mkdir(parents=True)
    assert data_path(None, "cube-double-play-singletask-task2-v0", sharded=True) == own

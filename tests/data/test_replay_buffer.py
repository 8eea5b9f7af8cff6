import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.replay_files import Header
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.errors import UserError

from .raw_episodes import make_episode


def assert_holds(buffer: Replay, episodes: list[Episode]) -> None:
    assert buffer.num_episodes == len(episodes)
    assert buffer.num_steps == sum(len(episode.actions) for episode in episodes)
    for name in ("observations", "actions", "rewards"):
        expected = np.concatenate([getattr(episode, name) for episode in episodes])
        assert np.array_equal(getattr(buffer, name), expected), name
    table = buffer.episodes()
    assert table.terminated.tolist() == [episode.terminated for episode in episodes]
    assert table.truncated.tolist() == [episode.truncated for episode in episodes]


def test_reopened_replay_holds_what_was_added(buffer: Replay, episodes: list[Episode]) -> None:
    assert_holds(buffer, episodes)
    buffer.close()
    assert_holds(Replay.open(buffer.path), episodes)


def test_nothing_in_the_folder_is_pickled(buffer: Replay) -> None:
    for path in buffer.path.glob("*.npy"):
        np.load(path, allow_pickle=False)
    header = json.loads((buffer.path / "replay.json").read_text())
    assert header["num_episodes"] == buffer.num_episodes


def test_capacity_takes_no_disk_space_before_it_is_used(
    new_buffer: Callable[..., Replay],
) -> None:
    empty = new_buffer(capacity=10_000_000)
    assert sum(path.stat().st_blocks * 512 for path in empty.path.iterdir()) < 1_000_000


def test_stats_count_by_source(new_buffer: Callable[..., Replay]) -> None:
    buffer = new_buffer()
    buffer.add(make_episode(0, 5, terminated=True, truncated=False), source="demonstrations")
    buffer.add(make_episode(1, 7, terminated=False, truncated=True), source="online")
    buffer.add(make_episode(2, 9, terminated=True, truncated=False), source="online")
    stats = buffer.stats
    assert (stats.episodes, stats.steps, stats.successes) == (3, 21, 2)
    assert vars(stats.by_source["demonstrations"]) == {"episodes": 1, "steps": 5, "successes": 1}
    assert vars(stats.by_source["online"]) == {"episodes": 2, "steps": 16, "successes": 1}


def episode_number(seed: int) -> Episode:
    won = seed % 2 == 0
    return make_episode(seed, 20 + seed % 9, terminated=won, truncated=not won)


def write_until_killed(path: Path) -> None:
    buffer = Replay.create(path, observation_dim=19, action_dim=7, capacity=10_000_000)
    for seed in itertools.count():
        buffer.add(episode_number(seed), source="demonstrations")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_replay_survives_a_kill_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "killed"
    # A fork, because a fresh interpreter takes seconds to import torch; the child uses only numpy.
    writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(path,))
    writer.start()
    deadline = time.monotonic() + 20
    try:
        while not (path / "replay.json").exists() or Replay.open(path).num_episodes <= 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        writer.kill()
        writer.join()

    buffer = Replay.open(path)
    assert buffer.num_episodes > 20
    expected = [episode_number(seed) for seed in range(buffer.num_episodes)]
    assert_holds(buffer, expected)
    extra = make_episode(99_999_999, 3, terminated=True, truncated=False)
    buffer.add(extra, source="demonstrations")
    assert_holds(Replay.open(path), [*expected, extra])


def test_half_written_tail_is_ignored_and_overwritten(
    buffer: Replay, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(header: Header, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Header, "write", die)
        with pytest.raises(KeyboardInterrupt):
            buffer.add(
                make_episode(77, 9, terminated=True, truncated=False), source="demonstrations"
            )
    assert_holds(buffer, episodes)
    assert_holds(Replay.open(buffer.path), episodes)
    later = make_episode(78, 4, terminated=True, truncated=False)
    buffer.add(later, source="demonstrations")
    assert_holds(buffer, [*episodes, later])


def test_cutting_back_returns_to_a_checkpoint(buffer: Replay, episodes: list[Episode]) -> None:
    buffer.truncate_to(4)
    assert_holds(buffer, episodes[:4])
    assert_holds(Replay.open(buffer.path), episodes[:4])
    buffer.add(episodes[9], source="demonstrations")
    assert_holds(buffer, [*episodes[:4], episodes[9]])
    with pytest.raises(UserError, match="holds 5 episodes; it cannot be cut back to 6"):
        buffer.truncate_to(6)


def test_second_writer_is_refused_until_the_first_closes(buffer: Replay) -> None:
    episode = make_episode(0, 5, terminated=True, truncated=False)
    other = Replay.open(buffer.path)
    with pytest.raises(UserError, match="being written by another process"):
        other.add(episode, source="demonstrations")
    buffer.close()
    other.add(episode, source="demonstrations")
    other.close()
    with pytest.raises(UserError, match="since it was opened here"):
        buffer.add(episode, source="demonstrations")


def test_full_replay_is_refused_and_left_as_it_was(
    new_buffer: Callable[..., Replay],
) -> None:
    buffer = new_buffer(capacity=10)
    first = make_episode(0, 7, terminated=True, truncated=False)
    buffer.add(first, source="demonstrations")
    with pytest.raises(UserError, match="holds 7 of 10 steps and 4 more do not fit"):
        buffer.add(make_episode(1, 4, terminated=True, truncated=False), source="demonstrations")
    last = make_episode(2, 3, terminated=True, truncated=False)
    buffer.add(last, source="demonstrations")
    assert_holds(buffer, [first, last])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("observations", np.zeros((4, 19)), r"observations of \(4, 19\), not \(5, 19\)"),
        ("observations", np.zeros((5, 18)), r"observations of \(5, 18\), not \(5, 19\)"),
        ("actions", np.zeros((4, 6)), r"actions of \(4, 6\), not \(4, 7\)"),
        ("rewards", np.zeros((4, 1)), r"rewards of \(4, 1\), not \(4,\)"),
        ("rewards", np.array([0, 0, np.nan, 0]), "NaN or infinite number in its rewards"),
        ("terminated", False, "neither terminated nor truncated"),
    ],
)
def test_bad_episode_is_refused(buffer: Replay, name: str, value: object, message: str) -> None:
    good = vars(make_episode(0, 4, terminated=True, truncated=False))
    before = buffer.num_episodes
    with pytest.raises(UserError, match=message):
        buffer.add(Episode(**{**good, name: value}), source="demonstrations")
    assert buffer.num_episodes == before


def test_episode_without_steps_is_refused(buffer: Replay) -> None:
    empty = Episode(np.zeros((1, 19)), np.zeros((0, 7)), np.zeros(0), True, False, True)
    with pytest.raises(UserError, match="has no step"):
        buffer.add(empty, source="demonstrations")


def test_folder_that_is_no_replay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a replay folder: it has no replay\.json"):
        Replay.open(tmp_path)


def test_replay_is_not_created_over_another(buffer: Replay) -> None:
    with pytest.raises(UserError, match="already holds a replay"):
        Replay.create(buffer.path, observation_dim=1, action_dim=1, capacity=1)


def test_replay_of_no_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="capacity is 0"):
        Replay.create(tmp_path / "none", observation_dim=1, action_dim=1, capacity=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other", "version": 1}', "{}"])
def test_damaged_header_is_refused(buffer: Replay, text: str) -> None:
    (buffer.path / "replay.json").write_text(text)
    with pytest.raises(UserError, match=r"replay\.json is damaged"):
        Replay.open(buffer.path)


def test_header_of_another_version_is_refused(buffer: Replay) -> None:
    path = buffer.path / "replay.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(UserError, match="this version reads"):
        Replay.open(buffer.path)


def test_cut_or_missing_array_is_refused(buffer: Replay) -> None:
    actions = buffer.path / "actions.npy"
    os.truncate(actions, 200)
    with pytest.raises(UserError, match=r"actions\.npy is missing or damaged"):
        Replay.open(buffer.path)
    actions.unlink()
    with pytest.raises(UserError, match=r"actions\.npy is missing or damaged"):
        Replay.open(buffer.path)
    np.save(actions, np.zeros((3, 3)))
    with pytest.raises(UserError, match=r"holds float64 \(3, 3\), but the header says"):
        Replay.open(buffer.path)


@pytest.mark.parametrize("kind", ["success_minus_one", "sparse"])
def test_returns_to_go_equal_the_backward_recursion(
    buffer: Replay, episodes: list[Episode], kind: str
) -> None:
    expected = []
    for episode in episodes:
        value, backwards = 0.0, []
        for reward in episode.rewards[::-1]:
            value = float(reward) - (kind == "success_minus_one") + 0.97 * value
            backwards.append(value if episode.terminated else np.nan)
        expected += backwards[::-1]
    actual = buffer.returns_to_go(0.97, RewardSpec(kind))  # type: ignore[arg-type]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert np.isnan(actual).any()


def test_returns_to_go_of_an_empty_replay_are_empty(
    new_buffer: Callable[..., Replay],
) -> None:
    assert new_buffer().returns_to_go(0.9, RewardSpec()).shape == (0,)

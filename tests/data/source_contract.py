"""What every source of episodes keeps: subclass `SourceContract` and give it a small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.base import Source, create_replay, fill


class SourceContract:
    """Needs a fixture `source` of two episodes or more."""

    @pytest.fixture
    def source(self) -> Source:
        raise NotImplementedError

    @pytest.fixture
    def episodes(self, source: Source) -> list[Episode]:
        return list(source.episodes())

    def test_shapes_and_types_are_those_that_the_sizes_say(
        self, source: Source, episodes: list[Episode]
    ) -> None:
        sizes = source.sizes
        assert len(episodes) > 1
        for episode in episodes:
            steps = episode.num_steps
            assert steps > 0
            assert episode.observations.shape == (steps + 1, sizes.observation_dim)
            assert episode.actions.shape == (steps, sizes.action_dim)
            assert episode.rewards.shape == (steps,)
            for array in (episode.observations, episode.actions, episode.rewards):
                assert array.dtype == np.float32
                assert np.isfinite(array).all()
            assert episode.images.keys() == (sizes.cameras or {}).keys()
            for name, shape in (sizes.cameras or {}).items():
                assert episode.images[name].shape == (episode.where_observed.sum(), *shape)
                assert episode.images[name].dtype == np.uint8
            assert episode.columns.keys() == sizes.columns.keys()
            for name, (dtype, entry) in sizes.columns.items():
                assert episode.columns[name].shape == (steps, *entry)
                assert episode.columns[name].dtype == dtype

    def test_no_more_is_read_than_the_sizes_say(
        self, source: Source, episodes: list[Episode]
    ) -> None:
        assert sum(e.num_steps for e in episodes) <= source.sizes.num_steps
        if source.sizes.cameras is not None:
            frames = sum(int(e.where_observed.sum()) for e in episodes)
            assert frames <= source.sizes.num_frames

    def test_every_episode_ends_once_and_success_terminates(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            assert episode.terminated != episode.truncated
            assert episode.terminated or not episode.success
            if isinstance(episode.task, tuple):
                assert len(episode.task) == episode.num_steps + 1

    def test_reading_twice_gives_the_same(self, source: Source, episodes: list[Episode]) -> None:
        again = list(source.episodes())
        assert len(again) == len(episodes)
        for one, other in zip(episodes, again, strict=True):
            assert_same(one, other)

    def test_reading_begins_where_it_is_asked_to(
        self, source: Source, episodes: list[Episode]
    ) -> None:
        later = list(source.episodes(1))
        assert len(later) == len(episodes) - 1
        assert_same(later[0], episodes[1])
        assert list(source.episodes(len(episodes))) == []

    def test_a_replay_filled_from_it_holds_what_the_episodes_had(
        self, source: Source, episodes: list[Episode], tmp_path: Path
    ) -> None:
        said: list[str] = []
        replay = create_replay(tmp_path / "replay", [source], more_steps=3)
        fill(replay, source, "name", said.append)
        assert said == [f"name: {note}" for note in source.notes()]
        assert replay.capacity == source.sizes.num_steps + 3
        assert_holds(replay, episodes)

    def test_filling_goes_on_where_it_was_interrupted(
        self, source: Source, episodes: list[Episode], tmp_path: Path
    ) -> None:
        replay = create_replay(tmp_path / "replay", [source])
        replay.add(episodes[0], source="name")
        replay.close()
        replay = Replay.open(tmp_path / "replay")
        fill(replay, source, "name", lambda line: None)
        assert_holds(replay, episodes)


def assert_same(one: Episode, other: Episode) -> None:
    for name in ("observations", "actions", "rewards", "where_observed"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("terminated", "truncated", "success", "task", "seed"):
        assert getattr(one, name) == getattr(other, name), name
    for part in ("images", "columns"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine), part


def assert_holds(replay: Replay, episodes: list[Episode]) -> None:
    for name in ("observations", "actions", "rewards"):
        expected = np.concatenate([getattr(e, name) for e in episodes])
        assert np.array_equal(getattr(replay, name), expected), name
    for name in replay.columns:
        expected = np.concatenate([e.columns[name] for e in episodes])
        assert np.array_equal(replay.column(name), expected), name
    for name in replay.cameras:
        expected = np.concatenate([e.images[name] for e in episodes])
        assert np.array_equal(replay.images(name), expected), name
    table = replay.episodes()
    assert set(table.source) == {"name"}
    for name in ("num_steps", "terminated", "truncated", "success"):
        assert getattr(table, name).tolist() == [getattr(e, name) for e in episodes], name

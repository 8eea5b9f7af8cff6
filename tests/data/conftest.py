"""A replay made of episodes with known contents."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay

from .raw_episodes import ACTION_DIM, OBSERVATION_DIM, make_episode


@pytest.fixture
def episodes() -> list[Episode]:
    """Both ends, both at once, and lengths below, at and above a chunk of 5."""
    ends = [(True, False), (False, True), (True, True)]
    lengths = [1, 4, 5, 6, 12]
    return [
        make_episode(10 * number + kind, length, terminated=ends[kind][0], truncated=ends[kind][1])
        for number, length in enumerate(lengths)
        for kind in range(len(ends))
    ]


@pytest.fixture
def new_buffer(tmp_path: Path) -> Callable[..., Replay]:
    def create(name: str = "replay", capacity: int = 1000) -> Replay:
        return Replay.create(
            tmp_path / name,
            observation_dim=OBSERVATION_DIM,
            action_dim=ACTION_DIM,
            capacity=capacity,
        )

    return create


@pytest.fixture
def buffer(new_buffer: Callable[..., Replay], episodes: list[Episode]) -> Replay:
    filled = new_buffer()
    for episode in episodes:
        filled.add(episode, source="demonstrations")
    return filled

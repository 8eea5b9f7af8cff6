"""Data too large for a replay: one file's episodes in memory, and after them the next one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.recorded import RecordedEpisodes
from vla_trqam.data.replay_files import Header
from vla_trqam.data.sampling import ChunkSampler, RewardSpec, ShortChunks, VectorObserver
from vla_trqam.data.sources.base import Sizes


class Shards(Protocol):
    """A dataset in files of one size, opened and checked as far as can be without reading all."""

    @property
    def where(self) -> str:
        """How messages name it."""

    @property
    def sizes(self) -> Sizes:
        """What one of the files has room for at most."""

    @property
    def num_shards(self) -> int:
        """How many files."""

    def shard(self, number: int) -> Iterator[Episode]:
        """The episodes of a file.

        Raises:
            UserError: it cannot be read.
        """

    def notes(self) -> list[str]:
        """What it holds and what is assumed of it, a line each, to be printed once."""


class Window(RecordedEpisodes):
    """The episodes of one file at a time, to be sampled like a replay's.

    What is in it is a function of the file's number: a run that is gone on with turns to the same
    one. Nothing is copied to the disk, and memory is that of one file.
    """

    def __init__(self, shards: Shards, source: str) -> None:
        """Shows the first file.

        Args:
            shards: the files.
            source: name that their episodes get.
        """
        self.path, self._shards, self._source = Path(shards.where), shards, source
        self._frames = None
        self._number = -1
        self.turn_to(0)

    def turn_to(self, turn: int) -> None:
        """Shows the file of a turn, after the last one the first again.

        Raises:
            UserError: it cannot be read.
        """
        number = turn % self._shards.num_shards
        if number == self._number:
            return
        sizes = self._shards.sizes
        self._header = Header(
            sizes.observation_dim, sizes.action_dim, sizes.num_steps, sources=(self._source,)
        )
        # Before the next file is read, the memory of the last one is given back. Rows that are
        # never written take none.
        self._held: dict[str, np.ndarray] = {}
        self._held = {n: np.empty(*spec) for n, spec in self._header.arrays().items()}
        self._fill(self._shards.shard(number))
        self._number = number
        self.revision += 1

    def sampler(
        self,
        *,
        chunk_length: int,
        discount: float,
        short_chunks: ShortChunks,
        reward: RewardSpec,
        flow_length: int | None = None,
    ) -> ChunkSampler:
        """A sampler of chunks of what is shown; arguments as those of `Replay.sampler`."""
        return ChunkSampler(
            self,
            VectorObserver(self),
            chunk_length=chunk_length,
            flow_length=flow_length,
            discount=discount,
            short_chunks=short_chunks,
            reward=reward,
        )

    def _fill(self, episodes: Iterable[Episode]) -> None:
        held, count, steps = self._held, 0, 0
        for episode in episodes:
            end = steps + episode.num_steps
            held["observations"][steps + count : end + count + 1] = episode.observations
            held["actions"][steps:end] = episode.actions
            held["rewards"][steps:end] = episode.rewards
            flags = episode.terminated, episode.truncated, episode.success
            held["episodes"][count] = (steps, episode.num_steps, *flags, 0)
            count, steps = count + 1, end
        self._header = replace(self._header, num_episodes=count, num_steps=steps)

    def _rows(self, array: str) -> np.ndarray:
        return self._held[array]

"""Chunks of several buffers as those of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np

from vla_trqam.data.recorded import RecordedEpisodes
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.data.transitions import TransitionBatch


class UnionSampler(ChunkSampler):
    """Draws uniformly from all that several samplers could draw."""

    def __init__(self, parts: Sequence[ChunkSampler]) -> None:
        """Join samplers of the same chunks, discount and reward."""
        first = parts[0]
        self._parts = tuple(parts)
        self.buffer = first.buffer
        self.observer, self.next_observer = first.observer, first.next_observer
        self.chunk_length, self.flow_length = first.chunk_length, first.flow_length
        self.discount = first.discount
        self.short_chunks, self.reward, self.sources = first.short_chunks, first.reward, None

    @property
    def buffers(self) -> tuple[RecordedEpisodes, ...]:
        """Those of all."""
        return tuple(buffer for part in self._parts for buffer in part.buffers)

    @property
    def num_starts(self) -> int:
        """How many chunks can be drawn now, one that counts several times so often."""
        return sum(part.num_starts for part in self._parts)

    @property
    def distinct(self) -> np.ndarray:
        """See :attr:`ChunkSampler.distinct`."""
        ends = np.cumsum([part.num_starts for part in self._parts])
        begins = (end - part.num_starts for end, part in zip(ends, self._parts, strict=True))
        return np.concatenate(
            [begin + part.distinct for begin, part in zip(begins, self._parts, strict=True)]
        )

    def gather(self, index: np.ndarray) -> TransitionBatch:
        """The chunks with these numbers, (B,): first those of the first part, and so on."""
        batches = [part.gather(own) for part, own in self._split(index)]
        return reduce(TransitionBatch.concatenate, batches)

    def outcomes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What came of the chunks with these numbers, in the order of `gather`."""
        found = [part.outcomes(own) for part, own in self._split(index)]
        returns, successes = zip(*found, strict=True)
        return np.concatenate(returns), np.concatenate(successes)

    def _split(self, index: np.ndarray) -> Iterator[tuple[ChunkSampler, np.ndarray]]:
        first = 0
        for part in self._parts:
            end = first + part.num_starts
            yield part, index[(index >= first) & (index < end)] - first
            first = end

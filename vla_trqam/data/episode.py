"""One episode: what a rollout, a dataset's reader and a replay hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

AT_A_TIME = 128
"""Frames: bounds the memory that a long episode's pictures take."""


class LazyImages:
    """An episode's pictures that are decoded as they are asked for: (F, H, W, C) uint8.

    A part of the frames is an array, and so is the whole to NumPy; a long episode of large pictures
    need not lie in memory.

    Attributes:
        shape: as an array's.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, shape: tuple[int, int, int, int], decode: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Frames of this shape; ``decode`` takes the numbers of some, increasing."""
        self.shape, self._decode = shape, decode

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: Any) -> np.ndarray:
        if isinstance(part, slice):
            return self._decode(np.arange(len(self))[part])
        whole: np.ndarray = np.asarray(self)[part]
        return whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, np.uint8)
        for part in in_parts(len(self)):
            whole[part] = self[part]
        return whole if dtype is None else whole.astype(dtype)


Images = np.ndarray | LazyImages


def in_parts(count: int) -> Iterator[slice]:
    """So many frames, a few at a time."""
    for first in range(0, count, AT_A_TIME):
        yield slice(first, min(first + AT_A_TIME, count))


@dataclass(frozen=True)
class Episode:
    """One whole episode of T control steps.

    Attributes:
        observations: s_0..s_T, (T + 1, S) float32; the last row is what the last action led to.
            Where the final state is unknown, repeat the one before and let `observed` say so.
        actions: as executed, (T, A) float32.
        rewards: (T,) float32.
        terminated: the task ended the episode at s_T, so nothing is bootstrapped. Wins when both
            ends are true.
        truncated: a limit cut it at s_T.
        success: whether the task was solved.
        task: what the policy is told to do; or T + 1 texts, what it is told in s_0..s_T.
        images: camera -> (F, H, W, C) uint8, the F frames that were taken, in order.
        observed: (T + 1,) bool, where these were taken; the first one must be. A state without a
            frame is never shown to the policy. None where each state has one, or none is taken.
        columns: further columns of a dataset, such as interventions: name -> (T, ...).
        seed: of the initial state; None for what no simulator of ours played.
        frames: (N, height, width, 3) uint8, a rollout's film: first, every n-th, and last step.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    success: bool
    task: str | tuple[str, ...] = ""
    images: Mapping[str, Images] = field(default_factory=dict)
    observed: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int | None = None
    frames: np.ndarray | None = None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.actions)

    @property
    def where_observed(self) -> np.ndarray:
        """`observed`, and all of the states where it says nothing: (T + 1,) bool."""
        if self.observed is None:
            return np.ones(self.num_steps + 1, dtype=bool)
        return self.observed


@dataclass(frozen=True)
class Episodes:
    """The table of the episodes in a replay, (E,) each.

    Attributes:
        first_step: row of the first step in `actions` and `rewards`.
        first_observation: row of the first observation in `observations`.
        num_steps: T; the episode owns T + 1 observations.
        terminated: the task ended the episode (success).
        truncated: a time limit ended it.
        success: the task was solved.
        source: name of where the episode came from.
    """

    first_step: np.ndarray
    first_observation: np.ndarray
    num_steps: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.num_steps)


@dataclass(frozen=True)
class SourceStats:
    """How much one source contributed."""

    episodes: int
    steps: int
    successes: int


@dataclass(frozen=True)
class ReplayStats:
    """What a replay holds, in total and by source."""

    episodes: int
    steps: int
    successes: int
    by_source: dict[str, SourceStats]

"""What a frozen model makes of each frame: computed once and kept, or whenever it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vla_trqam.data.frame_files import CacheHeader, cache_array
from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.replay_files import ArraySpec, Column
from vla_trqam.data.sampling import Observer
from vla_trqam.errors import UserError

FRAME = "frame"
"""The number of the frame, (B,) int64, beside what is seen or made of it."""

PrefixCache = Literal["auto", "disk", "none"]
"""Whether the large part of a frame's features is kept; see the settings."""

FeatureFunction = Callable[[FrameObservation], Mapping[str, Tensor]]
"""B observations in LeRobot's raw format, uint8 images, and their ``FRAME`` -> named features,
(B, ...) each."""

SAVED_EVERY = 5.0
"""Seconds of a pass over the frames after which what it made is safe on the disk."""

_STORED_AS: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,  # numpy has none: the same bits
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORED_AS}


class FeatureCache(Observer[FrameObservation]):
    """Features of all frames of a replay; a sampler's observations made of them.

    A killed `update` costs the last :data:`SAVED_EVERY` seconds at most; a power cut too, where
    what it makes is ``safe``.
    """

    def __init__(self, replay: Replay, compute: FeatureFunction, *, fingerprint: str) -> None:
        """A cache in the replay's folder; call `update` before sampling.

        Args:
            replay: whose frames.
            compute: see `FeatureFunction`.
            fingerprint: of everything the features depend on, such as a hash of the frozen weights
                and of the preprocessor. Rows made under another one are made again.
        """
        self._replay = replay
        self._compute = compute
        self._fingerprint = fingerprint
        self._header: CacheHeader | None = None
        self._columns: dict[str, Column] = {}
        self._read()

    @property
    def num_frames(self) -> int:
        """Frames whose features are there."""
        if self._revision != self._replay.revision:
            self._read()
        return 0 if self._header is None else self._header.num_frames

    def update(self, *, batch_size: int = 32, safe: bool = False) -> int:
        """Compute what is missing.

        Args:
            batch_size: frames at a time.
            safe: only what lies on the disk itself counts, so that no power cut leaves rows that
                are not there. `flush` does that for what was made otherwise.

        Returns:
            How many frames were computed.

        Raises:
            UserError: a feature has not one row a frame, a dtype that cannot be kept, or another
                shape than before; or another process writes to the replay.
        """
        self._replay.claim()
        before, rows = self.num_frames, self._replay.frame_index.rows_of_frames()
        parts = [rows[first : first + batch_size] for first in range(before, len(rows), batch_size)]
        saved = monotonic()
        try:
            for seen in _read_ahead(self._replay, parts):
                self._compute_batch(seen)
                if monotonic() - saved >= SAVED_EVERY:
                    self._save(safe)
                    saved = monotonic()
        finally:
            if parts:
                self._save(safe)
        return len(rows) - before

    def flush(self) -> None:
        """Force everything written to the disk itself; the replay's own `flush` does the headers.

        Otherwise a power cut could leave a header that counts rows which are not there.
        """
        for column in self._columns.values():
            column.sync()

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken."""
        return self._replay.frame_index.known(rows)

    def at(self, rows: np.ndarray, names: Collection[str] | None = None) -> FrameObservation:
        """Name -> (B, ...) features of the frames at these rows, in the dtype computed.

        Args:
            rows: of `Replay.observations`, (B,).
            names: of the features wanted; None for all.

        Raises:
            UserError: a frame's features are missing: `update` was not called.
        """
        frames = self._replay.frame_index.frames(rows)
        if self.num_frames <= frames.max(initial=-1) or self._header is None:
            raise UserError(
                f"The replay {self._replay.path} has frames without cached features: update the "
                "cache after adding episodes."
            )
        return {
            name: torch.from_numpy(self._columns[name].rows.take(frames, axis=0)).view(
                _TORCH_DTYPES[dtype]
            )
            for name, (dtype, _) in self._header.features.items()
            if names is None or name in names
        }

    def _read(self) -> None:
        self._revision = self._replay.revision
        header = CacheHeader.read(self._replay.path)
        self._header = header if header and header.fingerprint == self._fingerprint else None
        self._columns = {} if self._header is None else self._mapped(self._header)

    def _compute_batch(self, seen: FrameObservation) -> None:
        """Of the frames that come next; they count when :meth:`_save` was called."""
        first, rows = 0 if self._header is None else self._header.num_frames, len(seen[FRAME])
        features = self._compute(seen)
        described = {name: _described(name, value, rows) for name, value in features.items()}
        if self._header is None or not self._header.features:
            self._start(CacheHeader(self._fingerprint, 0, described))
        assert self._header is not None
        if self._header.features != described:
            raise UserError(
                f"The features to cache are {described}; in {self._replay.path} they are "
                f"{self._header.features}. Give the cache another fingerprint."
            )
        for name, value in features.items():
            stored = value.detach().cpu().contiguous()
            bits = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored
            self._columns[name].write(first, bits.numpy())
        self._header = replace(self._header, num_frames=first + rows)

    def _save(self, safe: bool) -> None:
        """The header counts what was computed, where asked after that lies on the disk itself."""
        if self._header is not None:
            if safe:
                self.flush()
            self._header.write(self._replay.path)

    def _start(self, header: CacheHeader) -> None:
        header.write(self._replay.path)  # first: no other header counts what is overwritten
        for name, spec in self._arrays(header).items():
            Column.allocate(self._replay.path, cache_array(name), spec)
        self._header, self._columns = header, self._mapped(header)

    def _mapped(self, header: CacheHeader) -> dict[str, Column]:
        return {
            name: Column(self._replay.path, cache_array(name), spec)
            for name, spec in self._arrays(header).items()
        }

    def _arrays(self, header: CacheHeader) -> dict[str, ArraySpec]:
        return {
            name: ((self._replay.frame_capacity, *shape), _STORED_AS[_TORCH_DTYPES[dtype]])
            for name, (dtype, shape) in header.features.items()
        }


class NumberedFeatures(Observer[FrameObservation]):
    """Cached features of a replay's frames, and the frames' numbers."""

    def __init__(
        self, cache: FeatureCache, replay: Replay, names: Collection[str] | None = None
    ) -> None:
        """Of all features, or of those with these names."""
        self._cache, self._replay, self._names = cache, replay, names

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken."""
        return self._cache.known(rows)

    def at(self, rows: np.ndarray) -> FrameObservation:
        """The features of the frames at these rows, and their numbers."""
        frames = self._replay.frame_index.frames(rows)
        return self._cache.at(rows, self._names) | {FRAME: torch.from_numpy(frames)}


class ComputedFeatures(Observer[FrameObservation]):
    """Features of a replay's frames, computed as they are asked for, and the frames' numbers."""

    def __init__(self, replay: Replay, compute: FeatureFunction) -> None:
        """See `FeatureFunction`."""
        self._replay, self._compute = replay, compute

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken."""
        return self._replay.frame_index.known(rows)

    def at(self, rows: np.ndarray) -> FrameObservation:
        """The features of the frames at these rows, and their numbers."""
        seen = _numbered(self._replay, rows)
        return {**self._compute(seen), FRAME: seen[FRAME]}


def _numbered(replay: Replay, rows: np.ndarray) -> FrameObservation:
    """The frames that are seen at these rows, each with the state and task of its own row.

    Where an episode terminated no frame was taken: what is seen there is the last one, whole, and
    not its picture beside another state.
    """
    frames = replay.frame_index.frames(rows)
    own = replay.frame_index.rows_of_frames()[frames]
    seen = replay.observation_at(own, image_dtype="uint8")
    return seen | {FRAME: torch.from_numpy(frames)}


def _read_ahead(replay: Replay, parts: Sequence[np.ndarray]) -> Iterator[FrameObservation]:
    """What is seen at the rows of each part; the next is read and decoded beside the work on it."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = [reader.submit(_numbered, replay, rows) for rows in parts[:1]]
        for number in range(len(parts)):
            seen = coming.pop().result()
            coming += [reader.submit(_numbered, replay, r) for r in parts[number + 1 : number + 2]]
            yield seen


def _described(name: str, value: Tensor, num_rows: int) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a row, as `CacheHeader.features` has them."""
    if value.ndim == 0 or len(value) != num_rows:
        raise UserError(f"The feature {name} has shape {tuple(value.shape)} for {num_rows} frames.")
    if value.dtype not in _STORED_AS:
        known = ", ".join(_TORCH_DTYPES)
        raise UserError(f"The feature {name} is {value.dtype}; a cache keeps {known}.")
    return str(value.dtype).removeprefix("torch."), tuple(value.shape[1:])

"""Frames that a replay has no copy of, read from the videos of its datasets as they are wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np

from vla_trqam.data.frames import image_key
from vla_trqam.data.sources.lerobot.source import LeRobotReader
from vla_trqam.errors import UserError

APART = 16
"""Frames of an episode so many rows apart are looked for one by one, with nothing between."""


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring frames of an episode.

    Attributes:
        places: among those asked for, (F,).
        reader: of the dataset.
        episode: its number there.
        rows: of the episode, (F,), increasing.
    """

    places: np.ndarray
    reader: LeRobotReader
    episode: int
    rows: np.ndarray


class LentPictures:
    """The frames of some datasets, by the numbers that a replay filled from these gives them."""

    def __init__(self, readers: Sequence[LeRobotReader], *, threads: int) -> None:
        """Notes where each frame lies; nothing is decoded.

        Args:
            readers: in the order in which the replay was filled.
            threads: that decode side by side.

        Raises:
            UserError: the frames of one cannot be read one by one.
        """
        self._readers = list(readers)
        dataset, episode, row = [], [], []
        for which, reader in enumerate(self._readers):
            check_lends(reader)
            for number in range(reader.num_episodes):
                rows = reader.frames_of(number)
                row.append(rows)
                episode.append(np.full(len(rows), number))
                dataset.append(np.full(len(rows), which))
        self._dataset = np.concatenate(dataset).astype(np.int16)
        self._episode = np.concatenate(episode).astype(np.int32)
        self._row = np.concatenate(row).astype(np.int32)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    @property
    def num_frames(self) -> int:
        """Of all datasets."""
        return len(self._row)

    def pictures(self, cameras: Collection[str], frames: np.ndarray) -> dict[str, np.ndarray]:
        """The frames with these numbers, (F,) -> (F, H, W, C) uint8 of each camera.

        Raises:
            UserError: one cannot be decoded.
        """
        shapes = self._readers[0].cameras
        found = {name: np.empty((len(frames), *shapes[name]), np.uint8) for name in cameras}

        def decode(wanted: tuple[str, _Stretch]) -> None:
            camera, part = wanted
            found[camera][part.places] = part.reader.pictures(camera, part.episode, part.rows)

        # The cameras side by side: of frames in a row there is one stretch.
        for _ in self._pool.map(decode, product(cameras, self._stretches(frames))):
            pass
        return found

    def _stretches(self, frames: np.ndarray) -> Iterator[_Stretch]:
        order = np.argsort(frames, kind="stable")
        numbers = frames[order]
        place = self._dataset[numbers], self._episode[numbers], self._row[numbers]
        new = np.zeros(len(frames), dtype=bool)
        new[1:] = (np.diff(place[0]) != 0) | (np.diff(place[1]) != 0) | (np.diff(place[2]) > APART)
        for part in np.split(np.arange(len(frames)), np.flatnonzero(new)):
            which, episode = int(place[0][part[0]]), int(place[1][part[0]])
            yield _Stretch(order[part], self._readers[which], episode, place[2][part])


def check_lends(reader: LeRobotReader) -> None:
    """Refuse a dataset whose frames cannot be read one by one.

    Raises:
        UserError: its pictures lie in tables, of which whole blocks are read for one.
    """
    for camera in reader.cameras:
        if reader.features[image_key(camera)]["dtype"] == "image":
            raise UserError(
                f"{reader.where} keeps the pictures of {camera} in its tables, of which a whole "
                "block is read for one: --replay.frames=dataset wants videos, copy takes both"
            )

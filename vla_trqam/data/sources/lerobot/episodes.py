"""The episodes of a LeRobotDataset: which there are, and where their rows and pictures lie.

An episode is known by its number, `episode_index`. LeRobot's own tables are looked up by position,
which is another episode as soon as one before it was deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_trqam.data.sources.lerobot.safety import LARGEST_COUNT, DatasetFolder, DatasetInfo
from vla_trqam.data.sources.lerobot.tables import ParquetTable
from vla_trqam.errors import UserError

_EPISODES = "meta/episodes/*/*.parquet"
_NUMBER, _LENGTH = "episode_index", "length"
_DATA_CHUNK, _DATA_FILE = "data/chunk_index", "data/file_index"


@dataclass(frozen=True)
class VideoPart:
    """Where an episode's pictures lie.

    Attributes:
        file: path in the dataset's folder.
        begin: of the episode in the video, in seconds.
        end: likewise.
    """

    file: str
    begin: float
    end: float


class EpisodeTable:
    """What `meta/episodes` says; an episode's position is its place in the order of the numbers.

    Attributes:
        numbers: (E,) of the episodes, increasing.
        lengths: (E,) rows of each.
    """

    def __init__(self, folder: DatasetFolder, info: DatasetInfo) -> None:
        """Read the table.

        Raises:
            UserError: it is missing, damaged, or says otherwise than `meta/info.json`.
        """
        self._info, self._missing = info, dict[str, str]()
        self._where = f"meta/episodes of the dataset {folder.root}"
        paths = [folder.file(name) for name in folder.files(_EPISODES)]
        if not paths:
            raise UserError(f"The dataset {folder.root} has no {_EPISODES}: is it whole?")
        parts = [self._read(path) for path in paths]
        whole = {n: np.concatenate([p[n] for p in parts]) for n in parts[0] if self._in_all(n)}
        order = np.argsort(whole[_NUMBER], kind="stable")
        self._columns = {name: column[order] for name, column in whole.items()}
        self.numbers, self.lengths = self._columns[_NUMBER], self._columns[_LENGTH]
        self._check()

    def chosen(self, episodes: Sequence[int] | None) -> list[int]:
        """Positions of the episodes with these numbers, increasing; None takes all.

        Raises:
            UserError: one does not exist or is named twice, or none is named.
        """
        if episodes is None:
            return list(range(len(self.numbers)))
        flag = "--dataset.episodes"
        if not episodes:
            raise UserError(f"{flag} names no episode; leave it out to read all.")
        for number in episodes:
            if number not in self.numbers:
                raise UserError(
                    f"{flag} names {number}, which does not exist: the first episode is "
                    f"{self.numbers[0]}, the last is {self.numbers[-1]}{self._holes()}."
                )
        twice, count = Counter(episodes).most_common(1)[0]
        if count > 1:
            raise UserError(f"{flag} names {twice} more than once.")
        return np.searchsorted(self.numbers, sorted(episodes)).tolist()

    def data_file(self, position: int) -> str:
        """Path in the folder of the table with the episode's rows."""
        chunk, file = (int(self._columns[name][position]) for name in (_DATA_CHUNK, _DATA_FILE))
        return self._info.data_file(chunk, file)

    def video(self, position: int, key: str) -> VideoPart:
        """Where the episode's pictures of a camera lie.

        Raises:
            UserError: the table does not say, or what it says cannot be.
        """
        names = _video_columns(key)
        for name in names:
            if name in self._missing:
                raise UserError(self._missing[name])
        chunk, file, begin, end = (float(self._columns[name][position]) for name in names)
        if min(chunk, file) < 0 or not 0 <= begin <= end < np.inf:
            raise UserError(
                f"{self._where}: episode {self.numbers[position]} has the video of {key!r} from "
                f"{begin:g} to {end:g} s of file {file:g} of chunk {chunk:g}, which cannot be."
            )
        return VideoPart(self._info.video_file(key, int(chunk), int(file)), begin, end)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        table = ParquetTable(path)

        def place(row: int) -> str:
            return f"row {row}"

        columns = {
            name: table.whole_numbers(name, place)
            for name in (_NUMBER, _LENGTH, _DATA_CHUNK, _DATA_FILE)
        }
        videos = [name for name, f in self._info.features.items() if f.dtype == "video"]
        for name in (column for key in videos for column in _video_columns(key)):
            if name in table.columns:
                columns[name] = table.numbers(name, 1, place)[:, 0]
            else:
                self._missing[name] = f"{path} has no column {name!r}."
        return columns

    def _in_all(self, name: str) -> bool:
        return name not in self._missing

    def _check(self) -> None:
        where, numbers, info = self._where, self.numbers, self._info
        twice = np.flatnonzero(np.diff(numbers) == 0)
        if twice.size:
            raise UserError(f"{where} lists episode {numbers[twice[0]]} twice.")
        for name in (_NUMBER, _LENGTH, _DATA_CHUNK, _DATA_FILE):
            column, least = self._columns[name], int(name == _LENGTH)
            wrong = np.flatnonzero((column < least) | (column > LARGEST_COUNT))
            if wrong.size:
                raise UserError(
                    f"{where} has {column[wrong[0]]} in {name!r} of episode {numbers[wrong[0]]}, "
                    "which cannot be."
                )
        for what, says, found in (
            ("episodes", info.total_episodes, len(numbers)),
            ("frames", info.total_frames, int(self.lengths.sum())),
        ):
            if says != found:
                raise UserError(
                    f"{where} lists {found} {what}; meta/info.json says total_{what} is {says}: "
                    "is the dataset whole?"
                )

    def _holes(self) -> str:
        count = int(self.numbers[-1] - self.numbers[0]) + 1 - len(self.numbers)
        return f", and {count} between them were deleted" if count else ""


def _video_columns(key: str) -> tuple[str, ...]:
    ends = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    return tuple(f"videos/{key}/{name}" for name in ends)

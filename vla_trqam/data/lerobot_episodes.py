"""The episodes of a LeRobotDataset: which there are, where they lie, and their rows, checked.

An episode is known by its number, `episode_index`. LeRobot's own tables are looked up by position,
which is another episode as soon as one before it was deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from vla_trqam.data.lerobot_safety import LARGEST_COUNT, DatasetFolder, DatasetInfo
from vla_trqam.data.lerobot_tables import ParquetTable, Tasks
from vla_trqam.errors import UserError

TaskChanges = Literal["refuse", "first", "frame"]
TASK_CHANGES: tuple[TaskChanges, ...] = ("refuse", "first", "frame")

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


@dataclass(frozen=True)
class EpisodeRows:
    """One episode's rows of R frames, without pictures.

    Attributes:
        number: its `episode_index`.
        position: in the order of the numbers.
        file: the table that holds it.
        rows: (R,) of the file.
        times: (R,) seconds since the episode's first frame, float64.
        columns: name -> (R, D), or (R,) of single numbers.
        told: R texts, what the policy is told to do.
    """

    number: int
    position: int
    file: Path
    rows: np.ndarray
    times: np.ndarray
    columns: dict[str, np.ndarray]
    told: tuple[str, ...]

    @property
    def length(self) -> int:
        """R."""
        return len(self.rows)


@dataclass(frozen=True)
class RowsWanted:
    """What is read of the tables, and what must hold.

    Attributes:
        vectors: name -> D.
        scalars: names of columns with one number a row.
        told: the texts of the column `task_index`, or the name of a column of texts.
        changes: what to do where the text changes within an episode.
        fps: frames per second.
        tolerance: seconds that a timestamp may be off.
    """

    vectors: Mapping[str, int]
    scalars: Collection[str]
    told: Tasks | str
    changes: TaskChanges
    fps: float
    tolerance: float


def read_rows(
    folder: DatasetFolder, table: EpisodeTable, positions: Sequence[int], wanted: RowsWanted
) -> tuple[list[EpisodeRows], int]:
    """The rows of some episodes.

    Returns:
        Them, in the given order, and how many rows of episodes that `meta/episodes` does not list
        lie between them.

    Raises:
        UserError: a file is missing or damaged, or anything in it is not as it must be.
    """
    files: dict[str, list[int]] = {}
    for position in positions:
        files.setdefault(table.data_file(position), []).append(position)
    found: dict[int, EpisodeRows] = {}
    strangers = 0
    for name, here in files.items():
        part = _DataFile(folder.file(name), wanted)
        strangers += int((~np.isin(part.episode, table.numbers)).sum())
        for position in here:
            found[position] = part.rows_of(
                position, int(table.numbers[position]), int(table.lengths[position])
            )
    return [found[position] for position in positions], strangers


class _DataFile:
    """One file of rows, all of whose wanted columns are in memory."""

    def __init__(self, path: Path, wanted: RowsWanted) -> None:
        table = ParquetTable(path)
        self.path, self._wanted = path, wanted
        self.episode = table.whole_numbers("episode_index", lambda row: f"row {row}")
        self._frame = table.whole_numbers("frame_index", lambda row: f"row {row}")
        widths = dict(wanted.vectors) | dict.fromkeys(wanted.scalars, 1) | {"timestamp": 1}
        self._columns = {n: table.numbers(n, width, self._place) for n, width in widths.items()}
        told, self._told = wanted.told, list[str]()
        if isinstance(told, str):
            self._told = table.texts(told, self._place)
        else:
            self._task = table.whole_numbers("task_index", self._place)
        self._order = np.argsort(self.episode, kind="stable")
        self._sorted = self.episode[self._order]

    def rows_of(self, position: int, number: int, length: int) -> EpisodeRows:
        """The rows of one episode, checked."""
        first, last = (np.searchsorted(self._sorted, number, side) for side in ("left", "right"))
        rows = self._order[first:last]
        if len(rows) != length:
            raise UserError(
                f"{self.path} holds {len(rows)} rows of episode {number}; meta/episodes says "
                f"that it has {length}, all in this file."
            )
        self._check_order(rows)
        columns = {name: self._numbers(name, rows) for name in self._columns}
        times = columns.pop("timestamp")[:, 0].astype(np.float64)
        self._check_times(rows, times)
        vectors = self._wanted.vectors
        columns = {n: v if n in vectors else v[:, 0] for n, v in columns.items()}
        columns["frame_index"] = self._frame[rows]
        return EpisodeRows(number, position, self.path, rows, times, columns, self._texts(rows))

    def _place(self, row: int) -> str:
        return f"episode {self.episode[row]}, frame {self._frame[row]}"

    def _check_order(self, rows: np.ndarray) -> None:
        wrong = np.flatnonzero(self._frame[rows] != np.arange(len(rows)))
        if wrong.size:
            row = int(rows[wrong[0]])
            raise UserError(
                f"{self.path}: episode {self.episode[row]} has {self._frame[row]} in "
                f"'frame_index' where {wrong[0]} comes next."
            )

    def _numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(R, D), float32 where they are not whole; a copy, so that the file's can go."""
        values = self._columns[name][rows]
        if values.dtype.kind != "f":
            return values
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        wrong = np.argwhere(~np.isfinite(values))
        if wrong.size:
            row, column = wrong[0]
            entry = f"[{column}]" if name in self._wanted.vectors else ""
            raise UserError(
                f"{self.path}: {self._place(int(rows[row]))} has {values[row, column]} in "
                f"{name!r}{entry}."
            )
        return values

    def _check_times(self, rows: np.ndarray, times: np.ndarray) -> None:
        """Each frame was taken when its number says; the column itself is of single precision."""
        fps, tolerance = self._wanted.fps, self._wanted.tolerance
        due = np.arange(len(rows)) / fps
        off = np.abs(times - due)
        wrong = np.flatnonzero(off > tolerance + np.spacing(due.astype(np.float32)))
        if not wrong.size:
            return
        row, worst = int(wrong[0]), float(off.max())
        enough = float(f"{1.01 * worst:.1g}") if worst >= 1e-4 else 1e-4
        enough = enough if enough > worst else 2 * enough
        remedy = (
            f"--dataset.tolerance_s={enough:g} takes it"
            if enough < 0.5 / fps
            else "more than half of the time between two frames cannot be tolerated"
        )
        raise UserError(
            f"{self.path}: {self._place(int(rows[row]))} has the timestamp {times[row]:.4f}, "
            f"{off[row]:.4f} s off its frame_index / fps of {due[row]:.4f}, and "
            f"--dataset.tolerance_s is {tolerance:g}; {remedy}."
        )

    def _texts(self, rows: np.ndarray) -> tuple[str, ...]:
        told, changes = self._wanted.told, self._wanted.changes
        if isinstance(told, str):
            texts = tuple(self._told[row] for row in rows)
        else:
            self._check_tasks(rows, told)
            texts = tuple(told.texts[number] for number in self._task[rows].tolist())
        changed = next((i for i, text in enumerate(texts) if text != texts[0]), None)
        if changed is None or changes == "frame":
            return texts
        if changes == "first":
            return texts[:1] * len(texts)
        raise UserError(
            f"{self.path}: the task changes at {self._place(int(rows[changed]))}, from "
            f"{_short(texts[0])} to {_short(texts[changed])}; --dataset.task_changes=first tells "
            "the policy each episode's first, =frame each frame's own."
        )

    def _check_tasks(self, rows: np.ndarray, told: Tasks) -> None:
        unknown = ~np.isin(self._task[rows], list(told.texts))
        if unknown.any():
            row = int(rows[unknown.argmax()])
            raise UserError(
                f"{self.path}: {self._place(row)} has the task_index {self._task[row]}, for which "
                f"{told.path} has no row."
            )


def check_parts(
    where: str, key: str, parts: Sequence[tuple[int, int, VideoPart]], fps: float
) -> None:
    """Refuse videos whose parts are too short for their episodes, or belong to two of them.

    Args:
        where: the dataset.
        key: of the camera.
        parts: (number, rows, part) of each episode.
        fps: frames per second.

    Raises:
        UserError: one is. Episodes that show the same part from the same moment on are let be.
    """
    frame = 1 / fps
    for number, length, part in parts:
        if part.end - part.begin < (length - 1.5) * frame:
            raise UserError(
                f"{where}: the video of {key!r} has {part.end - part.begin:.3f} s for episode "
                f"{number}, whose {length} frames take {length * frame:.3f} s."
            )
    for (one, length, first), (other, _, second) in _neighbours(parts):
        lies_over = first.begin + (length - 0.5) * frame > second.begin
        if lies_over and second.begin > first.begin + 0.5 * frame:
            raise UserError(
                f"{where}: {first.file} shows episode {one} from {first.begin:.3f} s on for "
                f"{length} frames, and episode {other} from {second.begin:.3f} s on: one of them "
                "would get the other's frames."
            )


def _neighbours(
    parts: Sequence[tuple[int, int, VideoPart]],
) -> Iterator[tuple[tuple[int, int, VideoPart], tuple[int, int, VideoPart]]]:
    ordered = sorted(parts, key=lambda part: (part[2].file, part[2].begin))
    for one, other in pairwise(ordered):
        if one[2].file == other[2].file:
            yield one, other


def _video_columns(key: str) -> tuple[str, ...]:
    ends = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    return tuple(f"videos/{key}/{name}" for name in ends)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

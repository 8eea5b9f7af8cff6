"""The rows of a LeRobotDataset's episodes, checked: all that is known of them but the pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vla_trqam.data.sources.lerobot.episodes import EpisodeTable
from vla_trqam.data.sources.lerobot.safety import DatasetFolder
from vla_trqam.data.sources.lerobot.tables import ParquetTable, Tasks
from vla_trqam.errors import UserError

TaskChanges = Literal["refuse", "first", "frame"]
TASK_CHANGES: tuple[TaskChanges, ...] = ("refuse", "first", "frame")


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
class RowNumbers:
    """What a dataset's table says of its rows without any image.

    Attributes:
        states: (N, S) float32.
        actions: (N, A) float32.
        episodes: (N,) numbers of the episodes in the dataset.
        frames: (N,) numbers of the rows in their episodes.
    """

    states: np.ndarray
    actions: np.ndarray
    episodes: np.ndarray
    frames: np.ndarray


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


def read_beside(path: Path, name: str, episodes: Sequence[EpisodeRows]) -> list[np.ndarray]:
    """A column of a file beside the tables, as LeRobot's reward models write one.

    Args:
        path: of the file: rows by `episode_index` and `frame_index`, of all episodes or more.
        name: of a column with one number a row.
        episodes: whose rows are wanted.

    Returns:
        (R,) float32 for each episode.

    Raises:
        UserError: the file is missing or damaged, lacks the column, a row or a number.
    """
    table = ParquetTable(path)
    where = lambda row: f"row {row}"  # noqa: E731
    keys = [table.whole_numbers(key, where) for key in ("episode_index", "frame_index")]
    values = table.numbers(name, 1, where)[:, 0].astype(np.float32)
    order = np.lexsort(keys[::-1])
    episode, frame = (key[order] for key in keys)
    found = []
    for each in episodes:
        first, end = np.searchsorted(episode, [each.number, each.number + 1])
        if not np.array_equal(frame[first:end], np.arange(each.length)):
            raise UserError(
                f"{path} has {end - first} rows of episode {each.number}, whose frames are 0 to "
                f"{each.length - 1}: it is of another dataset, or of an earlier state of this one."
            )
        own = values[order[first:end]]
        wrong = np.flatnonzero(~np.isfinite(own))
        if wrong.size:
            raise UserError(
                f"{path}: episode {each.number}, frame {wrong[0]} has {own[wrong[0]]} in {name!r}."
            )
        found.append(own)
    return found


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
        first = np.searchsorted(self._sorted, number, "left")
        rows = self._order[first : np.searchsorted(self._sorted, number, "right")]
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
        enough = float(f"{1.02 * worst:.3g}")  # a bit more, for the video rounds times too
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


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

"""The files of a replay folder: header, arrays and the lock of the process that writes."""

from __future__ import annotations

import fcntl
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from vla_trqam.errors import UserError
from vla_trqam.files import sync, written_whole

HEADER_NAME = "replay.json"
FORMAT = "vla_trqam.replay"
VERSION = 1
_EPISODE_COLUMNS = 6  # first_step, num_steps, terminated, truncated, success, source

ArraySpec = tuple[tuple[int, ...], type[np.generic]]
ColumnSpec = tuple[str, tuple[int, ...]]
"""Of a further column: `bool`, `int64` or `float32`, and the shape of one step's entry."""

COLUMN_DTYPES: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "int64": np.int64,
    "float32": np.float32,
}


@dataclass(frozen=True)
class Header:
    """What counts in the folder; see the layout in `vla_trqam.data.replay`.

    Attributes:
        observation_dim: O.
        action_dim: A.
        capacity: largest number of steps.
        num_episodes: rows of the episode table that count.
        num_steps: rows of actions and rewards that count.
        sources: names; an episode's row holds the position of its own.
        columns: further ones, one entry a step; absent in the file where there are none.
    """

    observation_dim: int
    action_dim: int
    capacity: int
    num_episodes: int = 0
    num_steps: int = 0
    sources: tuple[str, ...] = ()
    columns: dict[str, ColumnSpec] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the folder's header in one step, so that a reader never sees half of it."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if not self.columns:  # as before there were any
            del values["columns"]
        text = json.dumps(values, indent=1)
        with written_whole(folder / HEADER_NAME) as part:
            part.write_text(text + "\n")
            sync(part)  # or a power cut could leave the name with nothing in it

    @classmethod
    def read(cls, folder: Path) -> Header:
        """The folder's header.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        path = folder / HEADER_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not a replay folder: it has no {HEADER_NAME}.")
        try:
            values = json.loads(path.read_text())
            found = (values.pop("format"), values.pop("version"))
            columns = {n: (d, tuple(s)) for n, (d, s) in values.pop("columns", {}).items()}
            sources = tuple(values.pop("sources"))
            header = cls(**values, sources=sources, columns=columns)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: it is not the JSON header of a replay.") from error
        if found != (FORMAT, VERSION):
            raise UserError(f"{path} is {found}; this version reads {(FORMAT, VERSION)}.")
        return header

    def arrays(self) -> dict[str, ArraySpec]:
        """Name -> shape and dtype of every array in the folder."""
        # Every episode has at least one step, so T + 1 rows an episode never exceed twice the
        # steps. The files are sparse: rows never written take no space on disk.
        further: dict[str, ArraySpec] = {
            column_array(name): ((self.capacity, *shape), COLUMN_DTYPES[dtype])
            for name, (dtype, shape) in self.columns.items()
        }
        return further | {
            "observations": ((2 * self.capacity, self.observation_dim), np.float32),
            "actions": ((self.capacity, self.action_dim), np.float32),
            "rewards": ((self.capacity,), np.float32),
            "episodes": ((self.capacity, _EPISODE_COLUMNS), np.int64),
        }


def column_array(name: str) -> str:
    """Name of the array that holds a further column."""
    return f"column.{name}"


class Column:
    """One array on disk, read through a memory map and extended by ordinary writes.

    Writing through the map would be shorter, but a full disk would then kill the process with
    SIGBUS instead of raising OSError.
    """

    def __init__(self, folder: Path, name: str, spec: ArraySpec) -> None:
        """Map the array `name` of the folder.

        Raises:
            UserError: it is missing, damaged or not of this shape and dtype.
        """
        self.path = folder / f"{name}.npy"
        try:
            mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path} is missing or damaged ({error}).") from error
        shape, dtype = spec
        # More rows than the header says are of a replay that was killed as it grew.
        same = mapped.shape[1:] == shape[1:] and mapped.ndim == len(shape)
        if not same or len(mapped) < shape[0] or mapped.dtype != dtype:
            raise UserError(
                f"{self.path} holds {mapped.dtype} {mapped.shape}, but the header says "
                f"{np.dtype(dtype)} {shape}."
            )
        self.rows = np.asarray(
            mapped[: shape[0]]
        )  # the subclass memmap costs microseconds an index
        self._offset = mapped.offset
        self._row_bytes = mapped.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    @staticmethod
    def allocate(folder: Path, name: str, spec: ArraySpec) -> None:
        """Make the file, sparse and full of zeros."""
        shape, dtype = spec
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    @staticmethod
    def extend(folder: Path, name: str, num_rows: int) -> None:
        """Give a file more rows, sparse and full of zeros; those that it has stay where they are.

        Raises:
            UserError: the file's header has no room for the larger number.
        """
        path = folder / f"{name}.npy"
        with path.open("r+b") as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
            if num_rows <= shape[0]:
                return
            described = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": fortran_order,
                "shape": (num_rows, *shape[1:]),
            }
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, described)
            if header.tell() != begin:  # numpy leaves room for more digits, older ones did not
                raise UserError(f"{path} cannot be given {num_rows} rows: its header is full.")
            row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            # First the rows, then the number of them: a kill in between leaves the file as it was.
            file.truncate(begin + num_rows * row_bytes)
            file.seek(0)
            file.write(header.getvalue())

    def write(self, row: int, values: np.ndarray) -> None:
        """Write rows from `row` on; `values` has the shape of that many rows."""
        with open(self.path, "r+b") as file:
            file.seek(self._offset + row * self._row_bytes)
            file.write(np.ascontiguousarray(values, dtype=self.rows.dtype).data)

    def sync(self) -> None:
        """Wait until the disk itself has everything written."""
        sync(self.path)


class WriteLock:
    """Held by the one process that writes; the system frees it when that process ends."""

    def __init__(self, folder: Path) -> None:
        """A lock on the folder, not yet taken."""
        self._folder = folder
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process has it.
        """
        file = open(self._folder / "replay.lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"The replay {self._folder} is being written by another process."
            ) from error
        self._file = file

    def release(self) -> None:
        """Give the lock up; harmless when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

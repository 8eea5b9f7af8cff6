"""OGBench's npz: what a file must have, and what its header says without unpacking it."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from vla_trqam.data.sources.robomimic.safety import HARMLESS_IN_ALL, LARGEST_TOTAL_RATIO
from vla_trqam.errors import UserError

WANTED = ("observations", "actions", "terminals", "qpos")
BUTTONS = "button_states"
UNREADABLE = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Rows:
    """What a file holds, a row a state.

    Attributes:
        observations: (N, O) float32.
        actions: (N, A) float32; those of last rows lead nowhere.
        last: (N,) bool, the row is its trajectory's last.
        qpos: (N, Q) of the simulator.
        button_states: (N, B), where the task has buttons.
    """

    observations: np.ndarray
    actions: np.ndarray
    last: np.ndarray
    qpos: np.ndarray
    button_states: np.ndarray | None


@dataclass(frozen=True)
class Shapes:
    """What the headers of a file's arrays say.

    Attributes:
        rows: N, of all of them.
        sizes: name -> numbers in a row.
    """

    rows: int
    sizes: dict[str, int]


def read_shapes(path: Path) -> Shapes:
    """Of the arrays of a file, none of which is unpacked.

    Raises:
        UserError: it is not of OGBench's format, or its arrays are not of one length.
    """
    try:
        _check_size(path)
        with zipfile.ZipFile(path) as archive:
            shapes = {
                name.removesuffix(".npy"): _shape(archive.open(name))
                for name in archive.namelist()
                if name.removesuffix(".npy") in (*WANTED, BUTTONS)
            }
    except UserError:
        raise  # it says by itself what is wrong
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as OGBench's npz: {error}") from None
    _check_names(shapes, path)
    count = shapes["terminals"][0]
    for name, shape in shapes.items():
        if shape[0] != count:
            raise UserError(f"{path} has {shape[0]} rows of {name} and {count} of terminals")
    return Shapes(count, {name: int(np.prod(shape[1:])) for name, shape in shapes.items()})


def _shape(member: IO[bytes]) -> tuple[int, ...]:
    with member:
        version = np.lib.format.read_magic(member)
        old = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = read(member)[0]
        return shape or (0,)


def _check_names(names: Any, path: Path) -> None:
    missing = [name for name in WANTED if name not in names]
    if missing:
        more = "; OGBench relabels the data by qpos" if missing == ["qpos"] else ""
        raise UserError(f"{path} has no array {missing[0]!r}, which OGBench's data has{more}")


def read_rows(path: Path) -> Rows:
    """A file of OGBench's format.

    Raises:
        UserError: it is none.
    """
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            rows = _rows(file, path)
    except UserError:
        raise  # it says by itself what is wrong
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as OGBench's npz: {error}") from None
    _check(rows, path)
    return rows


def _check_size(path: Path) -> None:
    """What is unpacked must be in proportion to the file."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    stored = path.stat().st_size
    if unpacked > LARGEST_TOTAL_RATIO * stored + HARMLESS_IN_ALL:
        raise UserError(f"{path} of {stored} bytes claims to hold {unpacked}: it is refused")


def _rows(file: Any, path: Path) -> Rows:
    _check_names(file.files, path)
    arrays = {name: file[name] for name in ("observations", "actions", "qpos")}
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise UserError(
                f"{path} has {name} of {array.dtype} and shape {array.shape}; they must be floats, "
                "a row a state"
            )
    last = file["terminals"]
    if last.ndim != 1 or not np.isin(last, (0, 1)).all():
        raise UserError(f"{path} has terminals that are not one 0 or 1 a state")
    buttons = file[BUTTONS] if BUTTONS in file.files else None
    return Rows(
        observations=arrays["observations"].astype(np.float32, copy=False),
        actions=arrays["actions"].astype(np.float32, copy=False),
        last=last.astype(bool),
        qpos=arrays["qpos"],
        button_states=buttons,
    )


def _check(rows: Rows, path: Path) -> None:
    count = len(rows.last)
    if rows.button_states is not None and rows.button_states.ndim != 2:
        raise UserError(f"{path} has button_states of shape {rows.button_states.shape}, not (N, B)")
    for name in ("observations", "actions", "qpos", "button_states"):
        array = getattr(rows, name)
        if array is None:
            continue
        if len(array) != count:
            raise UserError(f"{path} has {len(array)} rows of {name} and {count} of terminals")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise UserError(f"{path} has a NaN or infinite number in row {row} of {name}")
    if count == 0 or not rows.last[-1]:
        raise UserError(f"{path} ends within a trajectory: the last of its terminals must be 1")
    lengths = np.diff(np.flatnonzero(rows.last), prepend=-1)
    if lengths.min() < 2:
        number = int(np.flatnonzero(lengths < 2)[0])
        raise UserError(f"{path} has no step in trajectory {number}: one state alone")
    outside = np.abs(rows.actions).max(axis=1) > 1.0
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise UserError(f"{path} has an action outside [-1, 1] in row {row}")

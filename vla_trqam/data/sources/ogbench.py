"""Reader for OGBench's npz data, relabelled for one of its single tasks.

A file holds trajectories of `T + 1` rows, the last of which has `terminals` set and is a state
alone. They were played for many goals and do not stop at the task's. OGBench judges a task by the
state *before* the action: a step that starts from a solved state has reward 0 and mask 0 (nothing
to bootstrap from), any other -1 and mask 1. A replay's episodes end where nothing is bootstrapped,
so a trajectory is cut after every step that starts from a solved state: that episode terminated and
succeeded, and what is left at the trajectory's end was cut by a limit. Step by step, these are
OGBench's transitions with its rewards less what `success_minus_one` takes off: 1 where the mask is
0, else 0. For tasks of several parts it is the sparse form of the reward, as in
:mod:`vla_trqam.envs.ogbench.family`.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.base import Sizes
from vla_trqam.data.sources.robomimic.safety import HARMLESS_IN_ALL, LARGEST_TOTAL_RATIO
from vla_trqam.envs.ogbench.family import make_ogbench
from vla_trqam.envs.seeding import global_seed
from vla_trqam.errors import UserError

VALIDATION = "-val.npz"
MADE = "recipes/make_ogbench_data.py"


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
class OGBenchData:
    """The files of a dataset, looked through once.

    Attributes:
        path: the file, or the folder of them.
        files: in order.
        task: the single task that they are relabelled for.
        observation_dim: O.
        action_dim: A.
        num_trajectories: of all files.
        num_steps: of all files.
        num_solved: steps that start from a solved state.
        mean: of the observations, (O,) float32.
        std: of the observations, (O,) float32.
    """

    path: Path
    files: tuple[Path, ...]
    task: str
    observation_dim: int
    action_dim: int
    num_trajectories: int
    num_steps: int
    num_solved: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.path)

    @property
    def sizes(self) -> Sizes:
        """What a replay must be made for."""
        return Sizes(self.observation_dim, self.action_dim, self.num_steps)

    def episodes(self, first: int = 0) -> Iterator[Episode]:
        """Every episode from number `first` on, with one file in memory at a time."""
        with _judge(self.task) as judge:
            yield from islice(self._cut(judge), first, None)

    def _cut(self, judge: _Judge) -> Iterator[Episode]:
        for file in self.files:
            rows = read_rows(file)
            yield from cut_episodes(rows, judge.solved(rows))
            del rows

    def notes(self) -> list[str]:
        """One line: what there is."""
        rare = "" if self.num_solved else ": the critic learns of no success from it"
        return [
            f"{self.num_trajectories} trajectories in {len(self.files)} files, {self.num_steps} "
            f"steps, {self.num_solved} of them from a solved state{rare}"
        ]


def dataset_name(task: str) -> str:
    """The data that OGBench has for a single task: ``cube-single-play-v0`` and the like."""
    return re.sub(r"-singletask(-task\d)?", "", task)


def data_path(path: Path | None, task: str) -> Path:
    """The path of the settings; without one, the place where OGBench keeps what it downloads.

    Raises:
        UserError: there is nothing.
    """
    name = dataset_name(task)
    own = Path("~/.ogbench/data").expanduser() / f"{name}.npz"
    if path is None and not own.exists():
        raise UserError(
            f"--dataset.path is not given and {own} is not there: OGBench's own {name}.npz, or "
            f"what `python {MADE} --dataset={name} --output={name}.npz` makes, would do"
        )
    return path or own


def read_ogbench(path: Path, task: str) -> OGBenchData:
    """Looks through the files at `path`, one after the other, and checks them.

    Args:
        path: a file, or a folder of them; those of a folder whose names end in "-val.npz" are for
            validation and left out.
        task: the single task, by its name in OGBench.

    Raises:
        UserError: there is no file, or one does not hold what OGBench's data of the task does.
    """
    files, seen = _files(path), _Seen()
    with _judge(task) as judge:
        for file in files:
            seen.look(file, judge)
        sizes = judge.observation_dim, judge.action_dim
    counts = seen.trajectories, seen.steps, seen.solved
    return OGBenchData(path, files, task, *sizes, *counts, *seen.moments())


def cut_episodes(rows: Rows, solved: np.ndarray) -> Iterator[Episode]:
    """Cuts trajectories after every step from a solved state, whose reward is 1.

    Args:
        rows: of a file.
        solved: (N,) bool, the row's state solves the task.
    """
    start = 0
    for row in range(len(rows.last)):
        if rows.last[row]:
            if row > start:
                yield _episode(rows, start, row, success=False)
            start = row + 1
        elif solved[row]:
            yield _episode(rows, start, row + 1, success=True)
            start = row + 1


def _episode(rows: Rows, start: int, end: int, *, success: bool) -> Episode:
    rewards = np.zeros(end - start, np.float32)
    rewards[-1] = success
    return Episode(
        observations=rows.observations[start : end + 1].copy(),  # else it would keep the file
        actions=rows.actions[start:end].copy(),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
    )


class _Judge:
    """OGBench's own relabelling for a task."""

    def __init__(self, task: str, env: Any) -> None:
        self._task, self._env = task, env
        with global_seed(0):  # a reset draws from there
            observation, _ = env.reset(seed=0)
        inner = env.unwrapped
        model = inner.model if hasattr(inner, "maze_map") else inner._model
        self.observation_dim, self.action_dim = len(observation), env.action_space.shape[0]
        self._num_qpos = int(model.nq)
        self._num_buttons = int(getattr(inner, "_num_buttons", 0))

    def check(self, rows: Rows, path: Path) -> None:
        """Refuses rows that are of another task's environment."""
        buttons = 0 if rows.button_states is None else rows.button_states.shape[1]
        for what, size, wanted in (
            ("observations", rows.observations.shape[1], self.observation_dim),
            ("actions", rows.actions.shape[1], self.action_dim),
            ("qpos", rows.qpos.shape[1], self._num_qpos),
            ("button_states", buttons, self._num_buttons),
        ):
            if size != wanted:
                raise UserError(
                    f"{path} has {what} of {size} numbers, the task {self._task} of {wanted}: it "
                    f"wants data of {dataset_name(self._task)}"
                )

    def solved(self, rows: Rows) -> np.ndarray:
        """(N,) bool."""
        from ogbench.relabel_utils import relabel_dataset

        dataset = {"qpos": rows.qpos, "button_states": rows.button_states}
        with global_seed(0):
            relabel_dataset(self._task, self._env, dataset)
        return np.asarray(dataset["masks"] == 0.0)


class _Seen:
    """What all files together have."""

    def __init__(self) -> None:
        self.trajectories = self.steps = self.solved = self._count = 0
        self._total = self._squares = np.zeros(())

    def look(self, file: Path, judge: _Judge) -> None:
        """Adds a file, once it is checked."""
        rows = read_rows(file)
        judge.check(rows, file)
        self.trajectories += int(rows.last.sum())
        self.steps += int((~rows.last).sum())
        self.solved += int((judge.solved(rows) & ~rows.last).sum())
        wide = rows.observations.astype(np.float64)
        self._count += len(wide)
        self._total = self._total + wide.sum(axis=0)
        self._squares = self._squares + (wide**2).sum(axis=0)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the observations, (O,) float32 each."""
        mean = self._total / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0))
        return mean.astype(np.float32), std.astype(np.float32)


@contextmanager
def _judge(task: str) -> Iterator[_Judge]:
    env = make_ogbench(task)
    try:
        yield _Judge(task, env)
    finally:
        env.close()


def _files(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        raise UserError(f"--dataset.path={path} does not exist; it must be an npz or a folder")
    if not path.is_dir():
        return (path,)
    files = tuple(sorted(p for p in path.glob("*.npz") if not p.name.endswith(VALIDATION)))
    if not files:
        raise UserError(f"--dataset.path={path} is a folder without an npz of training data")
    return files


def read_rows(path: Path) -> Rows:
    """A file of OGBench's format.

    Raises:
        UserError: it is none.
    """
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            rows = _rows(file, path)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
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
    missing = [n for n in ("observations", "actions", "terminals", "qpos") if n not in file.files]
    if missing:
        more = "; OGBench relabels the data by qpos" if missing == ["qpos"] else ""
        raise UserError(f"{path} has no array {missing[0]!r}, which OGBench's data has{more}")
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
    buttons = file["button_states"] if "button_states" in file.files else None
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

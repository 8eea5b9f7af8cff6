"""Reader for OGBench's npz data, relabelled for one of its single tasks.

A file holds trajectories of `T + 1` rows, the last of which has `terminals` set and is a state
alone. They were played for many goals and do not stop at the task's. OGBench judges a task by the
state *before* the action: a step that starts from a solved state has reward 0 and mask 0 (nothing
to bootstrap from), any other -1 and mask 1. A replay's episodes end where nothing is bootstrapped,
so a trajectory is cut after every step that starts from a solved state: that episode terminated and
succeeded, and what is left at the trajectory's end was cut by a limit. Step by step, these are
OGBench's transitions with its rewards less what `success_minus_one` takes off: 1 where the mask is
0, else 0. For tasks of several parts it is the sparse form of the reward, as in
:mod:`vla_trqam.envs.ogbench.family`; `dense` ones are OGBench's own.

Sets of 10 and 100 million steps are folders of files of one size. :func:`read_shards` takes those
for a :class:`~vla_trqam.data.window.Window`, which has one of them in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.base import Sizes
from vla_trqam.data.sources.ogbench_npz import BUTTONS, Rows, Shapes, read_rows, read_shapes
from vla_trqam.envs.ogbench.family import make_ogbench
from vla_trqam.envs.seeding import global_seed
from vla_trqam.errors import UserError

VALIDATION = "-val.npz"
MADE, NOT_PLAYED = "recipes/make_ogbench_data.py", ("ant", "humanoid")
BLOCK = 100_000
"""States at a time where numbers are widened to be summed."""


@dataclass(frozen=True)
class OGBenchData:
    """The files of a dataset, looked through once.

    Attributes:
        path: the file, or the folder of them.
        files: in order.
        task: the single task that they are relabelled for.
        dense: rewards are OGBench's own, not those of success.
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
    dense: bool
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
            rewards, solved = judge.relabelled(rows)
            yield from cut_episodes(rows, solved, rewards if self.dense else None)
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


def data_path(path: Path | None, task: str, *, sharded: bool = False) -> Path:
    """The path of the settings; without one, the place where OGBench keeps what it downloads.

    Args:
        path: of the settings.
        task: the single task.
        sharded: whether files are to take turns: OGBench's largest set, in a folder, is looked for.

    Raises:
        UserError: there is nothing.
    """
    if path is not None:
        return path
    name = dataset_name(task)
    folder = Path("~/.ogbench/data").expanduser()
    own = folder / (name.removesuffix("-v0") + "-100m-v0" if sharded else f"{name}.npz")
    if not own.exists():
        made = f"`python {MADE} --dataset={name} --output={name}" + (
            f" --shards=10 --episodes=1000` would make a smaller one, or --dataset.swap_every=null "
            f"takes {name}.npz"
            if sharded
            else ".npz` makes it"
        )
        if name.startswith(NOT_PLAYED):
            made = (
                "it cannot be made here, as ant and humanoid want an expert policy: `python -c "
                f"\"import ogbench; ogbench.download_datasets(['{name}'])\"` fetches OGBench's"
            )
        raise UserError(
            f"--dataset.path is not given and {own}, where OGBench's own would lie, is not there: "
            f"{made}"
        )
    return own


def read_ogbench(path: Path, task: str, *, dense: bool = False) -> OGBenchData:
    """Looks through the files at `path`, one after the other, and checks them.

    Args:
        path: a file, or a folder of them; those of a folder whose names end in "-val.npz" are for
            validation and left out.
        task: the single task, by its name in OGBench.
        dense: rewards are to be OGBench's own, not those of success.

    Raises:
        UserError: there is no file, or one does not hold what OGBench's data of the task does.
    """
    return _looked_through(path, _files(path), task, dense)


def _looked_through(path: Path, files: tuple[Path, ...], task: str, dense: bool) -> OGBenchData:
    seen = _Seen()
    with _judge(task) as judge:
        for file in files:
            seen.look(file, judge)
        sizes = judge.observation_dim, judge.action_dim
    counts = seen.trajectories, seen.steps, seen.solved
    return OGBenchData(path, files, task, dense, *sizes, *counts, *seen.moments())


@dataclass(frozen=True)
class OGBenchShards:
    """Files of one size that are drawn from in turn. Only the first one is looked through before.

    Attributes:
        path: the folder, or a file alone.
        files: in order.
        rows: of a file, states all of them.
        first: the first file.
    """

    path: Path
    files: tuple[Path, ...]
    rows: int
    first: OGBenchData

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.path)

    @property
    def sizes(self) -> Sizes:
        """Of the largest shard that there could be."""
        return Sizes(self.first.observation_dim, self.first.action_dim, self.rows)

    @property
    def num_shards(self) -> int:
        """Files."""
        return len(self.files)

    def shard(self, number: int) -> Iterator[Episode]:
        """The episodes of a file.

        Raises:
            UserError: it does not hold what OGBench's data of the task does.
        """
        yield from replace(self.first, files=(self.files[number],)).episodes()

    def notes(self) -> list[str]:
        """One line: what there is, and what is not known of it yet."""
        found = self.first.notes()[0].replace("in 1 files", f"in {self.files[0].name}")
        return [
            f"{self.num_shards} files of {self.rows} states, one in memory at a time, each looked "
            f"through when its turn comes; the policy's moments are the first one's: {found}"
        ]


def read_shards(path: Path, task: str, *, dense: bool = False) -> OGBenchShards:
    """Looks at what all files say of their arrays, and through the first one.

    Args:
        path: a folder of files, or one alone; see :func:`read_ogbench`.
        task: the single task.
        dense: rewards are to be OGBench's own, not those of success.

    Raises:
        UserError: there is no file, they are not of one size, or the first does not hold what
            OGBench's data of the task does.
    """
    files = _files(path)
    rows = _rows_of_each(files)
    return OGBenchShards(path, files, rows, _looked_through(path, files[:1], task, dense))


def _rows_of_each(files: Sequence[Path]) -> int:
    first: Shapes = read_shapes(files[0])
    for file in files[1:]:
        shapes = read_shapes(file)
        for name in sorted(first.sizes.keys() | shapes.sizes.keys()):
            one, other = first.sizes.get(name, 0), shapes.sizes.get(name, 0)
            if one != other:
                raise UserError(
                    f"{file} has {name} of {other} numbers and {files[0]} of {one}: the files of a "
                    "folder must be of one task"
                )
        if shapes.rows != first.rows:
            raise UserError(
                f"{file} has {shapes.rows} states and {files[0]} {first.rows}: files that take "
                "turns must be of one size, or the steps of the small ones count for more; without "
                "--dataset.swap_every all of them are read into the replay"
            )
    return first.rows


def cut_episodes(
    rows: Rows, solved: np.ndarray, rewards: np.ndarray | None = None
) -> Iterator[Episode]:
    """Cuts trajectories after every step from a solved state.

    Args:
        rows: of a file.
        solved: (N,) bool, the row's state solves the task.
        rewards: (N,) of the steps from these states; None for 1 from a solved one and else 0.
    """
    start = 0
    if rewards is None:
        rewards = solved.astype(np.float32)
    for row in np.flatnonzero(rows.last | solved):
        success = not rows.last[row]
        end = int(row) + success
        if end > start:
            yield _episode(rows, start, end, rewards, success=success)
        start = int(row) + 1


def _episode(rows: Rows, start: int, end: int, rewards: np.ndarray, *, success: bool) -> Episode:
    return Episode(
        observations=rows.observations[start : end + 1].copy(),  # else it would keep the file
        actions=rows.actions[start:end].copy(),
        rewards=rewards[start:end].copy(),
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
            (BUTTONS, buttons, self._num_buttons),
        ):
            if size != wanted:
                raise UserError(
                    f"{path} has {what} of {size} numbers, the task {self._task} of {wanted}: it "
                    f"wants data of {dataset_name(self._task)}"
                )

    def relabelled(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """OGBench's reward of a step from each state, (N,), and whether it is solved, (N,) bool."""
        from ogbench.relabel_utils import relabel_dataset

        dataset = {"qpos": rows.qpos, BUTTONS: rows.button_states}
        with global_seed(0):
            relabel_dataset(self._task, self._env, dataset)
        return np.asarray(dataset["rewards"], np.float32), np.asarray(dataset["masks"] == 0.0)


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
        self.solved += int((judge.relabelled(rows)[1] & ~rows.last).sum())
        for start in range(0, len(rows.last), BLOCK):
            wide = rows.observations[start : start + BLOCK].astype(np.float64)
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
    # What begins with a dot is half of a file, as a killed copy or download leaves it.
    named = (p for p in path.glob("[!.]*.npz") if not p.name.endswith(VALIDATION))
    files = tuple(sorted(named))
    if not files:
        raise UserError(f"--dataset.path={path} is a folder without an npz of training data")
    return files

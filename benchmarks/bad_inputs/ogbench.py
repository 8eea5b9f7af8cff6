"""Rows of the table of malformed input: OGBench's tasks, its npz files, and the making of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs.place import ROBOMIMIC, Command, Place, Row

MAZE = "pointmaze-medium-navigate-v0"
TASK = "pointmaze-medium-navigate-singletask-task1-v0"
TRAJECTORIES, STEPS = 3, 12
FLAGS = (
    *(flag for flag in ROBOMIMIC if not flag.startswith("--dataset.")),
    "--policy.hidden_dims=[8]",
    "--policy.chunk_length=2",
    "--pretrain.steps=2",
)
Arrays = dict[str, Any]
Change = Callable[[Arrays], object]


def rows_of_states() -> Arrays:
    """A small file of the point maze, sound."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 4, (TRAJECTORIES * (STEPS + 1), 2)).astype(np.float32)
    last = np.arange(len(xy)) % (STEPS + 1) == STEPS
    actions = rng.uniform(-1, 1, xy.shape).astype(np.float32)
    return {"observations": xy, "actions": actions, "terminals": last, "qpos": xy}


def _saved(path: Path, change: Change | None = None) -> None:
    arrays = rows_of_states()
    if change is not None:
        change(arrays)
    # A file of objects is one of the rows: it is written to be refused.
    np.savez(path, allow_pickle=True, **arrays)


def _finetune(place: Place, data: Path, *flags: str) -> Command:
    given = (f"--env.task={TASK}", f"--dataset.path={data}", *FLAGS, *flags)
    return Command("finetune_ogbench", (*given, f"--output_dir={place / 'run'}"))


def _file(change: Change, place: Place) -> Command:
    _saved(place / "maze.npz", change)
    return _finetune(place, place / "maze.npz")


def _folder(changes: Mapping[str, Change | None], place: Place) -> Command:
    (place / "set").mkdir()
    for name, change in changes.items():
        _saved(place / "set" / name, change)
    return _finetune(place, place / "set", "--dataset.swap_every=10")


def _flags(flags: tuple[str, ...], place: Place) -> Command:
    _saved(place / "maze.npz")
    return _finetune(place, place / "maze.npz", *flags)


def _made(flags: tuple[str, ...], place: Place) -> Command:
    given = (f"--dataset={MAZE}", f"--output={place / 'made.npz'}", "--workers=0", *flags)
    return Command("make_ogbench_data", given)


def _without(name: str) -> Change:
    return lambda arrays: arrays.pop(name)


def _put(name: str, value: float) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][4] = value

    return change


def _shaped(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda arrays: arrays.update({name: function(arrays[name])})


def _shorter(arrays: Arrays) -> None:
    arrays.update({name: array[: STEPS + 1] for name, array in arrays.items()})


SPOILED: tuple[tuple[str, Change, tuple[str, ...]], ...] = (
    ("no actions", _without("actions"), ("no array 'actions'",)),
    ("no qpos to relabel by", _without("qpos"), ("no array 'qpos'", "relabels")),
    ("a state that is not a number", _put("observations", np.nan), ("row 4 of observations",)),
    ("an action beyond its limits", _put("actions", 1.5), ("outside [-1, 1] in row 4",)),
    ("a trajectory without end", _shaped("terminals", np.zeros_like), ("terminals must be 1",)),
    ("an action too few", _shaped("actions", lambda a: a[1:]), ("38 rows of actions", "39")),
    (
        "states of another task",
        _shaped("observations", lambda o: np.hstack([o, o])),
        ("4 numbers",),
    ),
    ("objects to unpickle", _shaped("qpos", lambda q: q.astype(object)), ("cannot be read",)),
    ("states of whole numbers", _shaped("qpos", lambda q: q.astype(np.int64)), ("must be floats",)),
)
SETS: tuple[tuple[str, dict[str, Change | None], tuple[str, ...]], ...] = (
    ("a folder without files", {}, ("folder without an npz",)),
    ("validation files alone", {"a-000-val.npz": None}, ("folder without an npz",)),
    (
        "a file in turn without an array",
        {"a-000.npz": None, "a-001.npz": _without("actions")},
        ("a-001.npz", "no array 'actions'"),
    ),
    (
        "files in turn of two sizes",
        {"a-000.npz": None, "a-001.npz": _shorter},
        ("a-001.npz has 13 states", "39", "swap_every"),
    ),
    (
        "files in turn of two tasks",
        {"a-000.npz": None, "a-001.npz": _shaped("qpos", lambda q: np.hstack([q, q]))},
        ("a-001.npz has qpos of 4 numbers", "of 2", "one task"),
    ),
)
FLAG_ROWS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("--env.task=cube-twenty-play-singletask-task1-v0",), "an unknown domain", ("no task of",)),
    (("--env.task=cube-double-play-v0",), "data's name for a task's", ("single tasks",)),
    (("--env.task=null",), "no task", ("--env.task",)),
    (("--dataset.reward=column",), "a reward of another recipe", ("column", "dense")),
    (("--dataset.swap_every=0",), "files that take no turn", ("--dataset.swap_every=0", "1")),
    (("--dataset.path=none.npz",), "no such file", ("none.npz", "does not exist")),
)
MADE: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("--dataset=antmaze-large-navigate-v0",), "an ant's data", ("expert policy", "own files")),
    (("--dataset=cube-twenty-play-v0",), "data of no task", ("none of OGBench's",)),
    (("--shards=2",), "a file for a folder of them", ("must be a folder", "2 files")),
    (("--shards=-1",), "a negative number of files", ("--shards=-1",)),
    (("--episodes=0",), "no episode", ("--episodes=0", "at least 1")),
    (("--output=made.hdf5",), "another format", ("must end in .npz",)),
)


def _rows() -> tuple[Row, ...]:
    area = "OGBench"
    return (
        *(Row(area, wrong, partial(_file, change), ("maze.npz", *words))
          for wrong, change, words in SPOILED),
        *(Row(area, wrong, partial(_folder, changes), words) for wrong, changes, words in SETS),
        *(Row(area, f"`{' '.join(flags)}`: {wrong}", partial(_flags, flags), words)
          for flags, wrong, words in FLAG_ROWS),
        *(Row(area, f"`{' '.join(flags)}`: {wrong}", partial(_made, flags), words)
          for flags, wrong, words in MADE),
    )  # fmt: skip


ROWS = _rows() if find_spec("ogbench") is not None else ()

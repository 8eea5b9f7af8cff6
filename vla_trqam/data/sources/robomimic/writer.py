"""Demonstrations in robomimic's own HDF5 layout, streamed to disk and never half there.

Layout (robomimic's documentation, "Dataset contents and structure")::

    data                attrs: env_args (JSON), total (number of transitions)
    data/demo_0         attrs: num_samples, model_file, and whatever describes the demonstration
    data/demo_0/actions, rewards, dones, states, obs/<key>, next_obs/<key>
    mask/<filter key>   names of the demonstrations that belong to it

robomimic's readers take every child of ``data`` for a demonstration, so what concerns the whole
file stands in attributes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from vla_trqam.errors import UserError

Attribute = str | int | float | bool


@dataclass(frozen=True)
class Demonstration:
    """One episode as it is stored.

    Attributes:
        observations: key to (T + 1, D) float32; the last row is seen after the last action.
        actions: (T, A) float32 in [-1, 1], as executed.
        rewards: (T,) 1.0 on the steps after which the task is solved, else 0.0.
        states: (T, S) float64 simulator states before each action, (1, S) where only the first is
            kept, None where none is.
        model_file: the simulator's model as XML, or None.
        attributes: what else describes the episode (operator, seed, ...).
        filter_keys: the masks that list it.
    """

    observations: Mapping[str, NDArray[np.float32]]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    states: NDArray[np.float64] | None = None
    model_file: str | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    filter_keys: tuple[str, ...] = ()


class RobomimicWriter:
    """Writes demonstrations one by one; the file appears under its name only when it is whole.

    Use as a context manager. Leaving it normally finishes the file; leaving it by an exception
    (Ctrl-C included) removes what was written. A killed process leaves only ``<name>.partial``,
    which the next writer of that name replaces.
    """

    def __init__(
        self,
        path: Path,
        env_args: Mapping[str, Any],
        *,
        next_obs: bool = False,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> None:
        """Start the file.

        Args:
            path: where the finished file goes.
            env_args: robomimic's description of the environment; must be JSON-serialisable.
            next_obs: also store ``next_obs``, which doubles the observations.
            attributes: attributes of the whole file (on ``data``).

        Raises:
            UserError: the file exists, its folder does not, or another process is writing it.
        """
        _check_target(path)
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._next_obs = next_obs
        self._masks: dict[str, list[str]] = {}
        self._count = self._total = 0
        self._file = _open_new(self._partial)
        self._data = self._file.create_group("data")
        self._data.attrs["env_args"] = json.dumps(env_args, indent=4)
        for key, value in (attributes or {}).items():
            self._data.attrs[key] = value

    def append(self, demonstration: Demonstration) -> str:
        """Store a demonstration and return its name, ``demo_<i>``.

        Raises:
            ValueError: the arrays do not belong together or an action leaves [-1, 1].
        """
        _check(demonstration)
        name = f"demo_{self._count}"
        group = self._data.create_group(name)
        _write_arrays(group, demonstration, next_obs=self._next_obs)
        group.attrs["num_samples"] = len(demonstration.actions)
        for key, value in demonstration.attributes.items():
            group.attrs[key] = value
        if demonstration.model_file is not None:
            group.attrs["model_file"] = demonstration.model_file
        for key in demonstration.filter_keys:
            self.add_to_mask(key, [name])
        self._count += 1
        self._total += len(demonstration.actions)
        return name

    def add_to_mask(self, filter_key: str, names: Iterable[str]) -> None:
        """List demonstrations under a filter key."""
        self._masks.setdefault(filter_key, []).extend(names)

    def finish(self) -> None:
        """Write the masks and totals, flush to disk and give the file its name."""
        self._data.attrs["total"] = self._total
        for key, names in self._masks.items():
            self._file.create_dataset(f"mask/{key}", data=np.array(names, dtype="S"))
        self._file.close()
        with self._partial.open("rb") as written:
            os.fsync(written.fileno())
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def _check_target(path: Path) -> None:
    if path.exists():
        raise UserError(f"output: {path} exists already; name a new file or remove that one first.")
    if not path.parent.is_dir():
        raise UserError(f"output: the folder {path.parent} does not exist; create it first.")


def _open_new(partial: Path) -> h5py.File:
    try:
        # A model's XML is larger than the 64 KiB that older files can hold in an attribute, and
        # small arrays cost a third as much in this format. HDF5 1.10 (2016) or later reads it.
        return h5py.File(partial, "w", libver=("v110", "v110"))
    except BlockingIOError as error:
        raise UserError(f"output: another process is writing {partial}; wait for it.") from error
    except OSError as error:
        raise UserError(f"output: {partial} cannot be written ({error}).") from error


def _check(demonstration: Demonstration) -> None:
    steps = len(demonstration.actions)
    if steps == 0:
        raise ValueError("A demonstration needs at least one action.")
    if np.abs(demonstration.actions).max() > 1.0:
        raise ValueError("Actions must lie in [-1, 1].")
    lengths = {f"obs/{k}": len(v) - 1 for k, v in demonstration.observations.items()}
    lengths["rewards"] = len(demonstration.rewards)
    wrong = {key: length for key, length in lengths.items() if length != steps}
    if wrong:
        raise ValueError(f"Lengths disagree with the {steps} actions: {wrong}.")


def _write_arrays(group: h5py.Group, demonstration: Demonstration, *, next_obs: bool) -> None:
    rewards = np.asarray(demonstration.rewards, dtype=np.float32)
    _write(group, "actions", np.asarray(demonstration.actions, dtype=np.float32))
    _write(group, "rewards", rewards)
    # done marks success, as robomimic's dataset tools write it with --done_mode 0.
    _write(group, "dones", (rewards > 0).astype(np.int64))
    if demonstration.states is not None:
        _write(group, "states", np.asarray(demonstration.states, dtype=np.float64))
    for key, values in demonstration.observations.items():
        values = np.asarray(values, dtype=np.float32)
        _write(group, f"obs/{key}", values[:-1])
        if next_obs:
            _write(group, f"next_obs/{key}", values[1:])


def _write(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """Store an array, compressed where that is smaller: a short one costs more with its chunk."""
    if values.nbytes < 512:
        group.create_dataset(name, data=values)
        return
    group.create_dataset(
        name, data=values, chunks=values.shape, compression="gzip", compression_opts=9, shuffle=True
    )

"""Reader for robomimic's HDF5 demonstrations (low-dimensional observations)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.outliers import outliers
from vla_trqam.data.sources.base import Sizes
from vla_trqam.data.sources.robomimic.demo import (
    SUCCESS_REWARD,
    RobomimicDemo,
    demo_number,
    read_demo,
    refuse_unknown,
    require_group,
)
from vla_trqam.data.sources.robomimic.safety import Allowance, attribute, child, texts
from vla_trqam.errors import UserError

DEFAULT_OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


@dataclass(frozen=True)
class RobomimicFile:
    """The demos that were read from a file, and what the file says of its environment.

    Attributes:
        path: the file.
        env_args: robomimic's description of the environment: env_name, type, env_kwargs, ...
        obs_keys: observation keys in the order of the columns.
        demos: in the order of their numbers.
    """

    path: Path
    env_args: dict[str, Any]
    obs_keys: tuple[str, ...]
    demos: tuple[RobomimicDemo, ...]

    @property
    def observation_dim(self) -> int:
        """O."""
        return self.demos[0].observations.shape[1]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.demos[0].actions.shape[1]

    @property
    def num_steps(self) -> int:
        """Steps over all demos."""
        return sum(demo.num_steps for demo in self.demos)

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.path)

    @property
    def sizes(self) -> Sizes:
        """What a replay must be made for."""
        return Sizes(self.observation_dim, self.action_dim, self.num_steps)

    def episodes(self, first: int = 0) -> Iterator[Episode]:
        """Every demo from number `first` on; success terminates, anything else truncates."""
        for demo in self.demos[first:]:
            yield demo.episode

    def notes(self) -> list[str]:
        """One line: what there is, and what was cut."""
        successes = sum(demo.success for demo in self.demos)
        total = float(sum(demo.rewards.sum() for demo in self.demos))
        return [
            f"{len(self.demos)} episodes, {successes} successful, {self.num_steps} steps, "
            f"total reward {total:g}; {sum(demo.num_cut for demo in self.demos)} steps cut (after "
            "success, or without a next state)"
        ]

    @property
    def version(self) -> str:
        """The generation of robosuite that the file is for: "v1.4.1", "v1.5" or "unknown".

        The layout of the controller decides, because that is what an environment trips over; the
        version string is asked only where there is no controller.
        """
        return _controller_version(self.env_args) or _string_version(self.env_args) or "unknown"

    def select(self, names: Iterable[str]) -> RobomimicFile:
        """The same file with these demos only, in the order given.

        Raises:
            UserError: a name is not among the demos that were read.
        """
        by_name = {demo.name: demo for demo in self.demos}
        names = tuple(names)
        refuse_unknown(f"{self.path}: demo", names, by_name)
        return replace(self, demos=tuple(by_name[name] for name in names))


def read_env_args(path: Path) -> dict[str, Any]:
    """Robomimic's description of a file's environment; no demo is read.

    Raises:
        UserError: the file is missing or damaged, or has none.
    """
    with _opened(path) as file:
        return _read_env_args(require_group(file, "data", str(path)), path)


def read_action_size(path: Path) -> int:
    """A, of the first demo; nothing else is read.

    Raises:
        UserError: the file is missing or damaged, or has no demo with rows of actions.
    """
    with _opened(path) as file:
        data = require_group(file, "data", str(path))
        actions = next(
            (data[f"{name}/actions"] for name in data if f"{name}/actions" in data), None
        )
        if not isinstance(actions, h5py.Dataset) or len(actions.shape) != 2:
            raise UserError(f"{path} has no demo with rows of actions")
        return int(actions.shape[1])


def read_robomimic(
    path: str | Path,
    *,
    obs_keys: Sequence[str] = DEFAULT_OBS_KEYS,
    filter_key: str | None = None,
    demos: Sequence[str] | None = None,
    require_success: bool = True,
) -> RobomimicFile:
    """Read and check demos.

    Args:
        path: a robomimic file, of robosuite 1.4.1 or 1.5.
        obs_keys: observations to read; their columns stand side by side in this order.
        filter_key: read only the demos of this mask ("train", "better", ...).
        demos: read only these, by name. Not together with `filter_key`.
        require_success: refuse demos among which none succeeds: there is nothing to learn from.

    Raises:
        UserError: the file is missing or damaged, lacks a key, or holds lengths, shapes or numbers
            that cannot be right; the message names the file, the demo and the key.
    """
    path = Path(path)
    if not obs_keys:
        raise UserError(f"{path}: name at least one observation key to read.")
    if filter_key is not None and demos is not None:
        raise UserError(f"{path}: give a filter key or a list of demos, not both.")
    with _opened(path) as file:
        data = require_group(file, "data", str(path))
        env_args = _read_env_args(data, path)
        allowance = Allowance(path)
        masks = _read_masks(file, allowance)
        names = _select_names(path, data, masks, filter_key, demos)
        read = []
        for name in names:
            where = f"{path}: {name}"
            demo = require_group(data, name, f"{path}: data")
            filter_keys = tuple(key for key, members in masks.items() if name in members)
            read.append(read_demo(demo, where, tuple(obs_keys), filter_keys, allowance))
            _check_same_widths(read[-1], read[0], obs_keys, where)
    _check_outliers(path, read)
    if require_success:
        _check_any_success(path, read)
    return RobomimicFile(path, env_args, tuple(obs_keys), tuple(read))


def _check_outliers(path: Path, demos: Sequence[RobomimicDemo]) -> None:
    found = outliers(np.concatenate([demo.observations for demo in demos]), None)
    if not found:
        return
    row, column, middle = found[0]
    firsts = np.cumsum([0, *(len(demo.observations) for demo in demos)])
    number = int(np.searchsorted(firsts, row, side="right")) - 1
    value = demos[number].observations[row - firsts[number], column]
    raise UserError(
        f"{path}: {demos[number].name}: column {column} of its observations is {value:.4g} at step "
        f"{row - firsts[number]}, where the file's median is {middle:.4g}; leave the demo out by "
        "--dataset.filter_key, or mend it"
    )


def require_env_version(file: RobomimicFile) -> None:
    """Refuse to build an environment from a file made for another generation of robosuite.

    Reading such a file is fine; its controller settings and physics belong to the other one.

    Raises:
        UserError: the file and the installed robosuite do not fit, or the file contradicts itself.
    """
    stated = _string_version(file.env_args)
    if stated is not None and stated != file.version:
        raise UserError(
            f"{file.path}: env_args says robosuite {file.env_args['env_version']}, but its "
            f"controller is laid out as in {file.version}."
        )
    installed = installed_version("robosuite")
    if file.version != _generation(installed):
        raise UserError(
            f"{file.path} was made for robosuite {file.version.removeprefix('v')}, but robosuite "
            f"{installed} is installed: its data can be read, but no environment can be built from "
            "it; use the v1.5 file of the same dataset."
        )


def _generation(version: str) -> str | None:
    known = {"1.4": "v1.4.1", "1.5": "v1.5"}
    return known.get(".".join(version.split(".")[:2]))


def _string_version(env_args: dict[str, Any]) -> str | None:
    return _generation(str(env_args.get("env_version", "")))


def _controller_version(env_args: dict[str, Any]) -> str | None:
    controller = env_args.get("env_kwargs", {}).get("controller_configs")
    if not isinstance(controller, dict):
        return None
    # 1.5 nests one controller a body part; 1.4 has the arm's controller itself.
    return "v1.5" if "body_parts" in controller else "v1.4.1"


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except BlockingIOError as error:
        raise UserError(f"{path} is being written by another process.") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not an HDF5 file or is cut short ({error}).") from error


def _read_env_args(data: h5py.Group, path: Path) -> dict[str, Any]:
    text = attribute(data, "env_args", f"{path}: data")
    if text is None:
        raise UserError(f"{path}: the group 'data' has no attribute 'env_args'.")
    try:
        env_args = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: the attribute 'env_args' is not JSON ({error}).") from error
    if not isinstance(env_args, dict) or not isinstance(env_args.get("env_kwargs", {}), dict):
        raise UserError(f"{path}: the attribute 'env_args' is not robomimic's dictionary.")
    return env_args


def _read_masks(file: h5py.File, allowance: Allowance) -> dict[str, frozenset[str]]:
    """Filter key -> names of its demos; the official `mg` files have none."""
    where = str(file.filename)
    masks = child(file, "mask", where)
    if masks is None:
        return {}
    if not isinstance(masks, h5py.Group):
        raise UserError(f"{where}: 'mask' is not a group of filter keys.")
    return {key: _read_mask(masks, key, f"{where}: mask/{key}", allowance) for key in masks}


def _read_mask(masks: h5py.Group, key: str, where: str, allowance: Allowance) -> frozenset[str]:
    mask = child(masks, key, where)
    if not isinstance(mask, h5py.Dataset):
        raise UserError(f"{where} is not a list of demo names.")
    return frozenset(texts(mask, where, allowance))


def _select_names(
    path: Path,
    data: h5py.Group,
    masks: dict[str, frozenset[str]],
    filter_key: str | None,
    demos: Sequence[str] | None,
) -> list[str]:
    names: Iterable[str] = data.keys()
    if len(data) == 0:
        raise UserError(f"{path}: the group 'data' holds no demo.")
    if filter_key is not None:
        refuse_unknown(f"{path}: filter key", [filter_key], masks)
        names = masks[filter_key]
    elif demos is not None:
        names = demos
    names = sorted(set(names), key=demo_number)
    if not names:
        chosen = f"filter key '{filter_key}'" if filter_key else "list of demos"
        raise UserError(f"{path}: the {chosen} is empty.")
    refuse_unknown(f"{path}: demo", names, data)
    return names


def _check_same_widths(
    demo: RobomimicDemo, first: RobomimicDemo, obs_keys: Sequence[str], where: str
) -> None:
    keys = ("actions", *(f"obs/{key}" for key in obs_keys))
    found = (demo.actions.shape[1], *demo.obs_widths)
    expected = (first.actions.shape[1], *first.obs_widths)
    for key, mine, other in zip(keys, found, expected, strict=True):
        if mine != other:
            raise UserError(
                f"{where}: '{key}' has {mine} columns, but that of {first.name} has {other}."
            )


def _check_any_success(path: Path, demos: list[RobomimicDemo]) -> None:
    if any(demo.success for demo in demos):
        return
    largest = max(float(demo.rewards.max()) for demo in demos)
    raise UserError(
        f"{path}: none of the {len(demos)} demos succeeds: the largest of the 'rewards' is "
        f"{largest:g} and a solved task has {SUCCESS_REWARD:g}."
    )

"""One demo of a robomimic file: read, checked, and ended at its first success.

The convention on ends, whatever the file: an episode ends with its first success. The official
files go on for a few steps after it (the `mg` ones up to their fixed length); those steps are cut
and counted. An episode without success was ended by a limit of time or patience: it is truncated.

The state after the last step is taken from `next_obs`. Where a file has none, it is the next row of
`obs` if the episode was cut; else, after success, the last observation is repeated, as nobody ever
bootstraps from it; else the last step is dropped: without its next state it is no transition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import h5py
import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.robomimic.safety import Allowance, attribute, child
from vla_trqam.errors import UserError

SUCCESS_REWARD = 1.0  # robosuite's own, sparse and shaped alike
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RobomimicDemo:
    """One episode, ended at its first success.

    Attributes:
        name: its group, such as "demo_0".
        observations: s_0..s_T, (T + 1, O) float32, the keys side by side in the order asked for.
        actions: (T, A) float32 in [-1, 1].
        rewards: (T,) float32 as stored.
        success: the last step solved the task; otherwise the episode is truncated.
        num_cut: stored steps that are left out here, because they come after success or because
            their next state is not stored.
        filter_keys: names of the masks that hold this demo.
        obs_widths: how many columns of `observations` each key has.
    """

    name: str
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    success: bool
    num_cut: int
    filter_keys: tuple[str, ...]
    obs_widths: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.actions)

    @property
    def episode(self) -> Episode:
        """What a replay takes: success terminates, anything else truncates."""
        return Episode(
            observations=self.observations,
            actions=self.actions,
            rewards=self.rewards,
            terminated=self.success,
            truncated=not self.success,
            success=self.success,
        )


def read_demo(
    demo: h5py.Group,
    where: str,
    obs_keys: tuple[str, ...],
    filter_keys: tuple[str, ...],
    allowance: Allowance,
) -> RobomimicDemo:
    """Read one demo's group; `where` begins every message.

    Raises:
        UserError: a key is absent or lies elsewhere, or lengths, shapes or numbers cannot be right.
    """
    actions = _read_array(demo, "actions", where, allowance, ndim=2)
    num_steps = len(actions)
    if num_steps == 0:
        raise UserError(f"{where} has no steps.")
    _check_action_range(actions, where)
    stated = attribute(demo, "num_samples", where)
    if stated != num_steps:
        raise UserError(
            f"{where}: the attribute num_samples is {stated}, but there are {num_steps} actions."
        )
    rewards = _read_array(demo, "rewards", where, allowance, ndim=1, length=num_steps)
    columns = _read_obs(demo, "obs", where, obs_keys, allowance, length=num_steps)
    obs = np.concatenate(columns, axis=1)
    solved = np.flatnonzero(rewards >= SUCCESS_REWARD - _TOLERANCE)
    end = int(solved[0]) + 1 if len(solved) else num_steps
    observations = _with_final_state(
        demo, where, obs_keys, obs, end, allowance, success=len(solved) > 0
    )
    end = len(observations) - 1
    return RobomimicDemo(
        name=demo.name.rpartition("/")[2],
        observations=observations,
        actions=actions[:end],
        rewards=rewards[:end],
        success=len(solved) > 0,
        num_cut=num_steps - end,
        filter_keys=filter_keys,
        obs_widths=tuple(column.shape[1] for column in columns),
    )


def _with_final_state(
    demo: h5py.Group,
    where: str,
    obs_keys: tuple[str, ...],
    obs: np.ndarray,
    end: int,
    allowance: Allowance,
    *,
    success: bool,
) -> np.ndarray:
    """s_0..s_end, (end + 1, O); one row less where the last next state does not exist."""
    if child(demo, "next_obs", where) is not None:
        following = _read_obs(demo, "next_obs", where, obs_keys, allowance, length=len(obs))
        final = np.concatenate([column[end - 1] for column in following])
        if final.shape != obs[0].shape:
            raise UserError(
                f"{where}: next_obs has {len(final)} columns, but obs has {obs.shape[1]}."
            )
        return np.concatenate((obs[:end], final[None]))
    if end < len(obs):
        return obs[: end + 1]
    if success:
        return np.concatenate((obs, obs[-1:]))
    if len(obs) == 1:
        raise UserError(f"{where} is one failed step without next_obs: that is no transition.")
    return obs


def _read_obs(
    demo: h5py.Group,
    name: str,
    where: str,
    obs_keys: tuple[str, ...],
    allowance: Allowance,
    *,
    length: int,
) -> list[np.ndarray]:
    """The arrays of the keys, (length, D) each."""
    group = require_group(demo, name, where)
    refuse_unknown(f"{where}: the key {name}/", obs_keys, group)
    inside = f"{where}/{name}"
    return [_read_array(group, key, inside, allowance, ndim=2, length=length) for key in obs_keys]


def _read_array(
    group: h5py.Group,
    key: str,
    where: str,
    allowance: Allowance,
    *,
    ndim: int,
    length: int | None = None,
) -> np.ndarray:
    """A finite float32 array of `ndim` axes, with `length` rows where that is given."""
    dataset = child(group, key, where)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{where} has no array '{key}'.")
    if dataset.dtype.kind not in "fiub" or dataset.ndim != ndim:
        raise UserError(
            f"{where}: '{key}' is {dataset.dtype} of shape {dataset.shape}; it must hold numbers "
            f"on {ndim} axes."
        )
    if length is not None and len(dataset) != length:
        raise UserError(
            f"{where}: '{key}' has {len(dataset)} rows, but there are {length} actions."
        )
    allowance.take(dataset, f"{where}: '{key}'")
    with np.errstate(all="ignore"):  # a number too large for float32 is caught as infinite
        array = dataset[()].astype(np.float32)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise UserError(f"{where}: '{key}' is {array[tuple(bad[0])]} at step {bad[0][0]}.")
    if 0 in array.shape[1:]:
        raise UserError(f"{where}: '{key}' has no columns.")
    return array


def _check_action_range(actions: np.ndarray, where: str) -> None:
    low, high = actions.min(), actions.max()
    if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
        raise UserError(
            f"{where}: 'actions' lies in [{low:g}, {high:g}]; the environments take [-1, 1]."
        )


def require_group(parent: h5py.Group, name: str, where: str) -> h5py.Group:
    """The group `name` of `parent`, or a UserError that says where it is missing."""
    group = child(parent, name, where)
    if not isinstance(group, h5py.Group):
        raise UserError(
            f"{where} has no group '{name}'. A robomimic file has data/demo_N/obs; a raw one gets "
            "its observations by robomimic's dataset_states_to_obs.py."
        )
    return group


def refuse_unknown(what: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Raise a UserError for the first name asked for that is not known, listing what is."""
    known = list(known)
    unknown = [name for name in asked if name not in set(known)]
    if unknown:
        there = ", ".join(sorted(known, key=demo_number)[:20]) or "none"
        more = ", ..." if len(known) > 20 else ""
        raise UserError(f"{what} '{unknown[0]}' is not there; there are: {there}{more}.")


def demo_number(name: str) -> tuple[int, str]:
    """Sort key: demo_10 comes after demo_9."""
    digits = re.search(r"\d+$", name)
    return (int(digits.group()) if digits else -1, name)

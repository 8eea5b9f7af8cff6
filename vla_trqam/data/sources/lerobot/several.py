"""Several LeRobotDatasets that one run learns from, each with its own reward rule and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import SUCCESS_REWARDS, RewardKind, RewardSpec
from vla_trqam.data.sources.base import fill
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.errors import UserError

Scale = tuple[float, float]
_SCALES: tuple[Scale, ...] = tuple(SUCCESS_REWARDS.values())


def source_names(count: int) -> list[str]:
    """What the datasets are called in the replay: "dataset", "dataset_2", and so on."""
    return ["dataset", *(f"dataset_{number}" for number in range(2, count + 1))]


@dataclass(frozen=True)
class LeRobotDatasets:
    """Datasets of one robot, by what they are called in the replay; at least one.

    Attributes:
        named: their readers.
        parted: what this is one process's part of; None where it is all.
    """

    named: Mapping[str, LeRobotReader]
    parted: LeRobotDatasets | None = None

    @classmethod
    def opened(cls, configs: Sequence[LeRobotConfig]) -> Self:
        """Open and compare them.

        Raises:
            UserError: one cannot be read, or they cannot be learned from together.
        """
        names = source_names(len(configs))
        named = {n: LeRobotReader(config) for n, config in zip(names, configs, strict=True)}
        together = {n: spec for reader in named.values() for n, spec in reader.columns.items()}
        named = {name: reader.with_columns(together) for name, reader in named.items()}
        check_agree(named)
        check_scales(named)
        return cls(named)

    @property
    def first(self) -> LeRobotReader:
        """The one whose sizes are all others'."""
        return next(iter(self.named.values()))

    @property
    def num_rows(self) -> int:
        """Frames to read."""
        return sum(reader.num_rows for reader in self.named.values())

    @property
    def num_frames(self) -> int:
        """Rows whose images are their own."""
        return sum(reader.num_frames for reader in self.named.values())

    def part(self, number: int, count: int) -> Self:
        """Every ``count``-th episode of each from ``number`` on; see `LeRobotReader.part`."""
        return type(self)({n: r.part(number, count) for n, r in self.named.items()}, self.whole)

    @property
    def whole(self) -> LeRobotDatasets:
        """All processes' parts together."""
        return self.parted or self

    def check_cameras(self) -> None:
        """See `LeRobotReader.check_cameras`."""
        for reader in self.named.values():
            reader.check_cameras()

    def fill(
        self,
        replay: Replay,
        say: Callable[[str], None],
        *,
        copies: bool = True,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        """Put every episode of each into the replay, under its name, with its frames or without.

        It goes on where a call was interrupted. For ``save`` see
        :func:`~vla_trqam.data.sources.base.fill`.
        """
        for name, reader in self.named.items():
            fill(replay, reader if copies else reader.without_pictures(), name, say, save)


def check_agree(named: Mapping[str, LeRobotReader]) -> None:
    """Refuse datasets that are not of one robot, seen by the same cameras.

    Raises:
        UserError: naming two that differ, and in what.
    """
    for first, other in combinations(named.values(), 2):
        for what, mine, theirs in _differences(first, other):
            raise UserError(
                f"{first.where} and {_lower(other.where)} cannot be learned from together: {what} "
                f"{mine} in the first and {theirs} in the second"
            )


def _differences(first: LeRobotReader, other: LeRobotReader) -> Iterator[tuple[str, Any, Any]]:
    pairs: dict[str, tuple[Any, Any]] = {
        "frames per second are": (f"{first.fps:g}", f"{other.fps:g}"),
        "the numbers of an action are": (first.action_dim, other.action_dim),
        "the numbers of a state are": (first.state_dim, other.state_dim),
        "the cameras are": (_cameras(first), _cameras(other)),
        "the further columns are": (first.columns, other.columns),
    }
    for whose, names in (
        ("a state's", (first.state_names, other.state_names)),
        ("an action's", (first.action_names, other.action_names)),
    ):
        if all(names):
            pairs[f"the names of {whose} numbers are"] = list(names[0]), list(names[1])
    for what, (mine, theirs) in pairs.items():
        if mine != theirs:
            yield what, mine, theirs


def _cameras(reader: LeRobotReader) -> str:
    sizes = {name: " x ".join(map(str, shape)) for name, shape in sorted(reader.cameras.items())}
    return ", ".join(f"{name} ({size})" for name, size in sizes.items()) or "none"


def check_scales(named: Mapping[str, LeRobotReader]) -> None:
    """Refuse rewards of different scale: a critic would learn two values of the same action.

    The kind of a dataset makes a success reward of 0 and 1 either -1 on every step until
    success, or 1 on the step that succeeds. A column that is taken as it is must then be on that
    scale; only where no dataset has such a scale may columns hold any numbers.

    Raises:
        UserError: naming the two datasets, and what each gives.
    """
    for first, other in combinations(named.values(), 2):
        mine, theirs = _Rewards.of(first), _Rewards.of(other)
        if mine is not None and theirs is not None and not mine.fits(theirs):
            raise UserError(
                f"{first.where} gives rewards of {mine} and {_lower(other.where)} of {theirs}, but "
                "a critic learns one reward: bring both to one scale by their kinds "
                "(--dataset.kind, and kind in --dataset.more)"
            )


def check_rollouts(reader: LeRobotReader) -> None:
    """Refuse a reward column on another scale of success than rollouts' 0 and 1 beside it.

    Raises:
        UserError: naming both, and what would be right.
    """
    rewards = _Rewards.of(reader)
    if rewards is None or rewards.kind != "column":
        return
    sparse = SUCCESS_REWARDS["sparse"]
    if not rewards.fits(_Rewards("column", *sparse, frozenset({sparse}))):
        raise UserError(
            f"{reader.where} gives rewards of {rewards} and rollouts have 0 and 1, but a critic "
            "learns one reward: --dataset.reward=success makes those of the dataset 0 and 1 too, "
            "of which --dataset.kind=success_minus_one makes -1 and 0"
        )


@dataclass(frozen=True)
class _Rewards:
    """What the critic learns from a dataset."""

    kind: RewardKind
    low: float
    high: float
    scales: frozenset[Scale]

    @classmethod
    def of(cls, reader: LeRobotReader) -> _Rewards | None:
        """None where nobody said what the critic maximises."""
        kind = reader.config.kind
        if kind is None:
            return None
        learned = RewardSpec(kind).apply(np.unique(reader.rewards()))
        on = {s for s in _SCALES if np.isin(learned, s).all()}
        if kind != "column":
            on = {SUCCESS_REWARDS[kind]}
        return cls(kind, float(learned.min()), float(learned.max()), frozenset(on))

    def fits(self, other: _Rewards) -> bool:
        """Whether one critic can learn both; two graded columns are the user's to judge."""
        graded = not self.scales, not other.scales
        if any(graded):
            return self.kind == other.kind == "column"
        return bool(self.scales & other.scales)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} (kind {self.kind})"


def _lower(where: str) -> str:
    return where[0].lower() + where[1:]

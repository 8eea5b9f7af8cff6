"""Further columns of a LeRobotDataset: which are read beside state, action and outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vla_trqam.data.frames import STATE_KEY
from vla_trqam.data.replay_files import ColumnSpec
from vla_trqam.data.sources.lerobot.labels import LABELS, REWARD, RewardSource
from vla_trqam.data.sources.lerobot.safety import LARGEST_VECTOR, Feature
from vla_trqam.data.transitions import tells_interventions
from vla_trqam.errors import UserError

OBJECT_POSITIONS = "object_positions"
"""Where a simulator's objects are (m) before each action, as our recipes write it."""
_OWN = {
    *(STATE_KEY, "action", *LABELS),
    *("timestamp", "frame_index", "episode_index", "index", "task_index"),
}


def further_columns(
    where: str, features: Mapping[str, Feature], wanted: Iterable[str] | None
) -> dict[str, ColumnSpec]:
    """The columns to read.

    Args:
        where: the dataset, for messages.
        features: what it declares.
        wanted: names, `--dataset.columns`; None takes those that tell of interventions.

    Returns:
        Name -> dtype and shape of one row's entry; a list of one number is read as one.

    Raises:
        UserError: one that is wanted is not there, has another task, or is not of numbers.
    """
    there = {name: spec for name, spec in _specs(features).items() if spec is not None}
    if wanted is None:
        return {n: spec for n, spec in there.items() if tells_interventions(n)}
    for name in wanted:
        if name not in there:
            known = ", ".join(there) or "none"
            raise UserError(
                f"{where} has no further column of numbers {name!r} for --dataset.columns; it has "
                f"{known}."
            )
    return {name: there[name] for name in wanted}


def label_columns(
    where: str,
    features: Mapping[str, Feature],
    reward_column: str | None,
    reward_file: str | None,
    reward: RewardSource | None,
) -> list[str]:
    """Names of the columns that may tell of rewards and ends.

    Args:
        where: the dataset, for messages.
        features: what it declares.
        reward_column: the one that rewards are read from; None for `next.reward`.
        reward_file: beside the tables, which has it; None for the tables.
        reward: where rewards come from, if that was said.

    Raises:
        UserError: the column is not there or has not one number, or rewards come from elsewhere.
    """
    if reward_column is None:
        if reward == "progress":
            raise UserError(
                "--dataset.reward=progress takes what a column rises by: name it by "
                "--dataset.reward_column"
            )
        if reward_file is not None:
            raise UserError(
                f"--dataset.reward_file={reward_file} wants --dataset.reward_column, one of its "
                "columns"
            )
        return list(LABELS)
    if reward not in (None, "column", "progress"):
        raise UserError(
            f"--dataset.reward_column={reward_column} and --dataset.reward={reward} both say where "
            "rewards come from: leave one out"
        )
    rest = [label for label in LABELS if label != REWARD]
    if reward_file is not None:
        return rest
    single = [n for n, spec in _specs(features).items() if spec is not None and not spec[1]]
    if reward_column not in [*single, REWARD]:
        raise UserError(
            f"{where} has no column of one number {reward_column!r} for --dataset.reward_column; "
            f"it has {', '.join(sorted(single)) or 'none'}. One of a file beside it, as LeRobot's "
            "reward models write, wants --dataset.reward_file=NAME.parquet."
        )
    return [*rest, reward_column]


def _specs(features: Mapping[str, Feature]) -> dict[str, ColumnSpec | None]:
    return {name: _spec(feature) for name, feature in features.items() if name not in _OWN}


def _spec(feature: Feature) -> ColumnSpec | None:
    """None for what is no number, or a table of them."""
    kind = feature.dtype.rstrip("0123456789")
    dtype = {"bool": "bool", "int": "int64", "uint": "int64", "float": "float32"}.get(kind)
    sizes = feature.shape
    if dtype is None or len(sizes) > 1 or not all(1 <= size <= LARGEST_VECTOR for size in sizes):
        return None
    return dtype, () if feature.shape == (1,) else feature.shape

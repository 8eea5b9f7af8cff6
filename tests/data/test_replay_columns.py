"""Further columns beside state, action and reward."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.errors import UserError

from .raw_episodes import ACTION_DIM, OBSERVATION_DIM, make_episode

COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "intervention": ("bool", ()),
    "complementary_info.force": ("float32", (2,)),
}


def create(path: Path, **changes: Any) -> Replay:
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "capacity": 20}
    return Replay.create(path, **({**sizes, "columns": COLUMNS} | changes))


def episode(seed: int, steps: int, **columns: np.ndarray) -> Any:
    made = make_episode(seed, steps, terminated=True, truncated=False)
    return dataclasses.replace(made, columns=columns)


def test_columns_are_kept_and_an_episode_without_one_has_zeros(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay")
    force = np.arange(6, dtype=np.float32).reshape(3, 2)
    flags = np.array([False, True, True])
    told = {"intervention": flags, "complementary_info.force": force}
    replay.add(episode(0, 3, **told), source="dataset")
    replay.add(episode(1, 3, **told), source="dataset")
    replay.truncate_to(1)
    replay.add(episode(2, 2), source="online")  # over rows that held something else
    replay.close()
    again = Replay.open(tmp_path / "replay")
    assert again.columns == COLUMNS
    assert again.column("intervention").tolist() == [False, True, True, False, False]
    assert again.column("intervention").dtype == bool
    expected = np.concatenate([force, np.zeros((2, 2))])
    assert np.array_equal(again.column("complementary_info.force"), expected)
    again.grow(500)
    assert np.array_equal(again.column("complementary_info.force"), expected)


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay")
    for columns, message in (
        ({"speed": np.zeros(3)}, "the column 'speed'; the replay has intervention, compl"),
        ({"intervention": np.zeros((3, 1))}, r"has intervention of \(3, 1\), not \(3,\)"),
        ({"complementary_info.force": np.full((3, 2), np.nan)}, "NaN .* in its complementary_"),
    ):
        with pytest.raises(UserError, match=message):
            replay.add(episode(0, 3, **columns), source="dataset")
    with pytest.raises(UserError, match="has no column 'speed'; it has intervention, complementa"):
        replay.column("speed")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a/b": ("bool", ())}, "'a/b' holds a '/'"),
        ({"text": ("string", ())}, "column text is string; it can be one of bool, int64, float32"),
        ({"empty": ("bool", (0,))}, r"column empty is \(0,\); sizes must be at least 1"),
    ],
)
def test_a_column_that_no_file_can_hold_is_refused(
    tmp_path: Path, columns: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create(tmp_path / "replay", columns=columns)
    assert not (tmp_path / "replay").exists()

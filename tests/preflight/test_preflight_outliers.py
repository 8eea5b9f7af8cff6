"""One corrupted number is found and named; honest data that lies far out is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.outliers import outliers
from vla_trqam.data.sources.lerobot.rows import RowNumbers
from vla_trqam.preflight.outliers import check_outliers, policy_scale

ROWS = 60


def far(numbers: np.ndarray, scale: list[float] | None) -> list[list[int]]:
    found = outliers(numbers, None if scale is None else np.array(scale))
    return [[row, dim] for row, dim, _ in found]


def normal(std: float, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, std, (rows, 1)).astype(np.float32)


@pytest.mark.parametrize("value", [1e6, -1e6, 1e8, np.nan, np.inf])
@pytest.mark.parametrize("scale", [[0.5], [0.0], [1e-8], None])
def test_a_corrupted_number_is_found_whatever_the_policy_knows(
    value: float, scale: list[float] | None
) -> None:
    numbers = normal(0.5)
    numbers[17, 0] = value
    assert far(numbers, scale) == [[17, 0]]


def test_every_row_is_looked_at() -> None:
    numbers = normal(0.5, rows=450_001)
    numbers[300_001, 0] = 1e6
    assert far(numbers, [0.5]) == [[300_001, 0]]


def seldom_closed() -> np.ndarray:
    numbers = np.zeros((ROWS, 1), np.float32)
    numbers[-1] = 1
    return numbers


@pytest.mark.parametrize(
    ("numbers", "scale"),
    [
        (seldom_closed(), 0.05),
        (seldom_closed(), 0.0),
        (3 + normal(1e-3), 1e-8),
        (np.concatenate([normal(0.5), np.full((1, 1), 4.0, np.float32)]), 0.5),
        (normal(500.0), 0.5),
        (normal(0.5)[:1], 0.5),
    ],
    ids=["gripper", "gripper-flat", "noise", "8-sigma", "other-units", "one-row"],
)
def test_honest_numbers_are_not_outliers(numbers: np.ndarray, scale: float) -> None:
    assert far(numbers, [scale]) == []


def policy(std: float) -> Any:
    def entry() -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(1), "std": torch.full((1,), std)}

    kind = SimpleNamespace(type="any")
    normalizer = SimpleNamespace(
        norm_map={"any": SimpleNamespace(value="MEAN_STD")},
        features={"observation.state": kind, "action": kind},
    )
    processors = SimpleNamespace(
        statistics={"observation.state": entry(), "action": entry()}, normalizer=normalizer
    )
    return SimpleNamespace(processors=processors, host=SimpleNamespace(config=SimpleNamespace()))


def reader(states: np.ndarray, actions: np.ndarray) -> Any:
    frames = np.arange(ROWS) % 30
    rows = RowNumbers(states, actions, episodes=np.repeat([4, 9], 30), frames=frames)
    return SimpleNamespace(row_numbers=lambda: rows)


def test_episode_frame_and_dimension_are_named() -> None:
    states, actions = normal(0.5), normal(0.5)
    states[3, 0], actions[35, 0] = 1e8, 1e6
    finding = check_outliers(policy(0.5), reader(states, actions))
    assert not finding.ok
    assert "observation.state[0] is 1e+08 in frame 3 of episode 4" in finding.found
    assert "action[0] is 1e+06 in frame 5 of episode 9" in finding.found
    assert "--dataset.episodes" in finding.remedy


def test_sound_rows_pass() -> None:
    finding = check_outliers(policy(0.5), reader(normal(0.5), normal(0.5)))
    assert finding.ok
    assert finding.found == "none in 60 rows"


@pytest.mark.parametrize(
    ("mode", "entry", "scale"),
    [
        ("MEAN_STD", {"mean": [3.0], "std": [0.2]}, 0.2),
        ("MIN_MAX", {"min": [-1.0], "max": [5.0]}, 3.0),
        ("QUANTILES", {"q01": [0.0], "q99": [1.0]}, 0.5),
        ("QUANTILE10", {"q10": [2.0], "q90": [3.0]}, 0.5),
        ("IDENTITY", {"mean": [3.0], "std": [0.2]}, None),
    ],
)
def test_the_policys_scale_is_one_unit_of_its_normalised_numbers(
    mode: str, entry: dict[str, list[float]], scale: float | None
) -> None:
    step = SimpleNamespace(
        norm_map={"ACTION": SimpleNamespace(value=mode)},
        features={"action": SimpleNamespace(type="ACTION")},
    )
    known = {"action": {name: torch.tensor(value) for name, value in entry.items()}}
    policy: Any = SimpleNamespace(processors=SimpleNamespace(statistics=known, normalizer=step))
    found = policy_scale(policy, "action")
    assert found is None if scale is None else found == pytest.approx([scale])

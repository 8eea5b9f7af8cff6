"""Several LeRobotDatasets in one replay: what must agree, and whose rewards are whose."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardKind, RewardSpec
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.data.sources.lerobot.several import (
    LeRobotDatasets,
    check_rollouts,
    source_names,
)
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.engine.alarms import reward_range
from vla_trqam.errors import UserError
from vla_trqam.preflight.data import RewardSummary

from .lerobot_files import LENGTH, Written, edit_info

EPISODES = 4
ENDS = [frame == LENGTH - 1 for _ in range(EPISODES) for frame in range(LENGTH)]
ONCE = [float(end) for end in ENDS]
COSTS = [reward - 1 for reward in ONCE]
GRADED = [0.3 * reward for reward in ONCE]


def config_of(
    root: Path, rewards: list[float], kind: RewardKind | None, **changes: Any
) -> LeRobotConfig:
    extra = {"next.reward": ("float32", rewards), **changes.pop("extra", {})}
    Written(extra=extra).write(root)
    return LeRobotConfig(f"local/{root.name}", root, kind=kind, **changes)


def opened(*configs: LeRobotConfig) -> LeRobotDatasets:
    return LeRobotDatasets.opened(configs)


def filled(datasets: LeRobotDatasets, path: Path) -> tuple[Replay, list[str]]:
    said: list[str] = []
    replay = create_replay(path, list(datasets.named.values()), more_steps=9, more_frames=9)
    datasets.fill(replay, said.append)
    return replay, said


def test_each_dataset_has_a_name_and_is_told_with_its_rule(tmp_path: Path) -> None:
    assert source_names(3) == ["dataset", "dataset_2", "dataset_3"]
    demos = config_of(tmp_path / "demos", ONCE, "column", reward="terminal_success")
    failures = config_of(tmp_path / "failures", [0.0] * len(ENDS), "column", episodes=(1, 3))
    replay, said = filled(opened(demos, failures), tmp_path / "replay")
    sources = replay.stats.by_source
    assert {name: (s.episodes, s.steps, s.successes) for name, s in sources.items()} == {
        "dataset": (4, 24, 4),
        "dataset_2": (2, 12, 0),
    }
    assert replay.rewards.sum() == 4
    assert f"dataset: 4 episodes, 4 successful, 24 steps; the dataset {tmp_path}/demos" in said
    assert f"dataset_2: 2 episodes, 0 successful, 12 steps; the dataset {tmp_path}/failur" in (
        "\n".join(said)
    )
    assert "dataset: reward: 1 on the last step of every episode: all of th" in "\n".join(said)
    assert "dataset_2: reward: the column next.reward" in said


def test_every_process_has_a_part_of_each_dataset(tmp_path: Path) -> None:
    both = opened(*(config_of(tmp_path / name, ONCE, "sparse") for name in "ab"))
    parts = [both.part(number, 2) for number in range(2)]
    assert [part.num_rows for part in parts] == [2 * 2 * LENGTH] * 2
    assert (both.num_rows, both.num_frames) == (2 * len(ONCE), 2 * len(ONCE))
    states = [
        [int(e.observations[0, 0]) for reader in part.named.values() for e in reader.episodes()]
        for part in parts
    ]
    assert states == [[0, 2, 0, 2], [1, 3, 1, 3]]
    with pytest.raises(UserError, match=r"/a has 4 episodes for 5 processes"):
        both.part(0, 5)


def test_rewards_of_two_rules_are_one_scale_for_the_critic(tmp_path: Path) -> None:
    """Once 1 at success and -1 until then are the same reward, by the kind of each."""
    once = config_of(tmp_path / "once", ONCE, "success_minus_one")
    costs = config_of(tmp_path / "costs", COSTS, "column")
    replay, _ = filled(opened(once, costs), tmp_path / "replay")
    assert replay.rewards.tolist() == ONCE + COSTS, "stored as they came"
    reward = RewardSpec("success_minus_one", {"dataset_2": "column"})
    assert replay.rewards_as(reward).tolist() == COSTS * 2
    sampler = replay.sampler(chunk_length=2, discount=0.5, short_chunks="pad", reward=reward)
    batch = sampler.gather(np.arange(sampler.num_starts))
    half = sampler.num_starts // 2
    assert torch.equal(batch.chunk_return[:half], batch.chunk_return[half:])
    # The success of the datasets' last step terminates: its return is 0, the step's before -1.
    assert batch.chunk_return[:LENGTH].tolist() == [-1.5, -1.5, -1.5, -1.5, -1.0, 0.0]
    returns = replay.returns_to_go(0.5, reward)
    assert returns[: len(ENDS)].tolist() == returns[len(ENDS) :].tolist()
    assert returns[:3].tolist() == [-1.9375, -1.875, -1.75]
    summary = RewardSummary.of(replay, sampler)
    assert (summary.low, summary.high) == (-1, 0)
    assert summary.kind == "success_minus_one (dataset_2: column)"
    assert reward_range(sampler, rolls_out=True) == (-1, 0)
    everywhere = RewardSpec("success_minus_one")
    with pytest.raises(UserError, match="holds the reward -1"):
        replay.rewards_as(everywhere)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((ONCE, "sparse"), (COSTS, "column"), r"0 to 1 \(kind sparse\) .* -1 to 0 \(kind column\)"),
        ((ONCE, "sparse"), (ONCE, "success_minus_one"), r"kind sparse.*kind success_minus_one"),
        ((ONCE, "column"), (COSTS, "column"), r"0 to 1 \(kind column\) .* -1 to 0"),
        ((ONCE, "sparse"), (GRADED, "column"), r"0 to 1 .* 0 to 0.3 \(kind column\)"),
        ((GRADED, "column"), (ONCE, "sparse"), r"0 to 0.3 .* 0 to 1 \(kind sparse\)"),
        ((COSTS, "column"), (ONCE, "success_minus_one"), None),
        ((ONCE, "column"), (ONCE, "sparse"), None),
        ((GRADED, "column"), (COSTS, "column"), None),
        (([0.0] * len(ENDS), "column"), (COSTS, "column"), None),
    ],
)
def test_a_critic_learns_one_scale(
    tmp_path: Path, first: Any, second: Any, message: str | None
) -> None:
    configs = config_of(tmp_path / "a", *first), config_of(tmp_path / "b", *second)
    if message is None:
        opened(*configs)
        return
    with pytest.raises(UserError, match=r"The dataset .*/a gives rewards .* the dataset .*/b") as e:
        opened(*configs)
    assert e.match(message)


def test_two_further_datasets_are_compared_with_each_other(tmp_path: Path) -> None:
    """Failures alone fit either scale."""
    failures = config_of(tmp_path / "failures", [0.0] * len(ENDS), "column")
    once = config_of(tmp_path / "once", ONCE, "column")
    costs = config_of(tmp_path / "costs", COSTS, "column")
    opened(failures, once)
    opened(failures, costs)
    with pytest.raises(UserError, match=r"/once gives rewards of 0 to 1 .*/costs of -1 to 0"):
        opened(failures, once, costs)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda info: info.update(fps=10.5), "frames per second"),
        (
            lambda info: info["features"]["observation.state"].update(names=["y", "x"]),
            r"names of a state's numbers are \['x', 'y'\] in the first and \['y', 'x'\] in the sec",
        ),
        (
            lambda info: info["features"]["action"].update(names=["r", "l"]),
            r"names of an action's numbers are \['l', 'r'\] in the first and \['r', 'l'\] in",
        ),
    ],
)
def test_datasets_that_are_not_of_one_robot_are_refused(
    tmp_path: Path, edit: Any, message: str
) -> None:
    configs = [config_of(tmp_path / name, ONCE, "sparse", tolerance_s=0.04) for name in "ab"]
    for root in (tmp_path / "a", tmp_path / "b"):
        edit_info(root, lambda i: i["features"]["observation.state"].update(names=["x", "y"]))
        edit_info(root, lambda i: i["features"]["action"].update(names={"motors": ["l", "r"]}))
    opened(*configs)
    edit_info(tmp_path / "b", edit)
    with pytest.raises(UserError, match=f"/a and the dataset .*/b cannot be learned .*{message}"):
        opened(*configs)


def test_other_cameras_and_other_columns_are_refused(tmp_path: Path) -> None:
    plain = config_of(tmp_path / "plain", ONCE, "sparse")
    Written(images=("observation.images.top",)).write(tmp_path / "seen")
    seen = LeRobotConfig("x", tmp_path / "seen", reward="terminal_success")
    with pytest.raises(UserError, match=r"cameras are none in the first and top \(32 x 32 x 3\)"):
        opened(plain, seen)
    opened(
        plain,
        LeRobotConfig("x", tmp_path / "seen", None, looked_through=(), reward="terminal_success"),
    )
    numbers = list(range(len(ENDS)))
    marked = [
        config_of(tmp_path / kind, ONCE, "sparse", extra={"x": (kind, numbers)}, columns=("x",))
        for kind in ("int64", "float32")
    ]
    with pytest.raises(UserError, match=r"further columns are .*int64.* first and .*float32"):
        opened(*marked)


FLAGS = [row % 5 == 0 for row in range(len(ENDS))]
TAKEN = {"complementary_info.is_intervention": ("bool", FLAGS)}


def test_columns_of_interventions_travel_to_the_batch_and_back(tmp_path: Path) -> None:
    (name,) = TAKEN
    extra = {**TAKEN, "gain": ("float32", [0.5 * row for row in range(len(ENDS))])}
    reader = LeRobotReader(config_of(tmp_path / "a", ONCE, "sparse", extra=extra))
    assert reader.columns == {name: ("bool", ())}, "the other is not asked for"
    both = config_of(tmp_path / "b", ONCE, "sparse", extra=extra, columns=(name, "gain"))
    replay, said = filled(opened(both), tmp_path / "replay")
    assert f"dataset: further columns: {name}, gain" in said
    assert replay.column(name).tolist() == FLAGS
    reward = RewardSpec("sparse")
    sampler = replay.sampler(chunk_length=3, discount=0.9, short_chunks="pad", reward=reward)
    batch = sampler.gather(np.array([0, LENGTH - 1]))
    assert batch.columns[name].dtype == torch.bool
    assert batch.columns[name].tolist() == [[True, False, False], [True, True, True]]
    assert batch.columns["gain"].tolist() == [[0.0, 0.5, 1.0], [2.5, 2.5, 2.5]]
    write_lerobot_dataset(replay, tmp_path / "out", repo_id="local/out", fps=10)
    again = LeRobotReader(LeRobotConfig("local/out", tmp_path / "out", columns=(name, "gain")))
    copy = create_replay(tmp_path / "copy", [again])
    fill(copy, again, "dataset", lambda line: None)
    for column in (name, "gain"):
        assert copy.column(column).dtype == replay.column(column).dtype
        assert np.array_equal(copy.column(column), replay.column(column))


def test_a_dataset_without_a_column_of_interventions_has_zeros_beside_one_that_has_it(
    tmp_path: Path,
) -> None:
    (name,) = TAKEN
    marked = config_of(tmp_path / "marked", ONCE, "sparse", extra=TAKEN)
    plain = config_of(tmp_path / "plain", ONCE, "sparse")
    assert opened(marked).first.sizes.columns == {name: ("bool", ())}
    replay, said = filled(opened(marked, plain), tmp_path / "replay")
    assert replay.column(name).tolist() == FLAGS + [False] * len(FLAGS)
    assert f"dataset: further columns: {name}" in said
    assert f"dataset_2: no column {name}: zeros, nobody intervened" in said
    asked = LeRobotConfig("local/plain", tmp_path / "plain", columns=(name,))
    with pytest.raises(UserError, match=rf"/plain has no further column .*'{name}' .* none"):
        opened(asked)


def test_rollouts_have_zeros_in_further_columns(tmp_path: Path) -> None:
    datasets = opened(config_of(tmp_path / "a", ONCE, "sparse", extra=TAKEN))
    replay, _ = filled(datasets, tmp_path / "replay")
    replay.add(replace(next(datasets.first.episodes()), columns={}), source="online")
    (name,) = TAKEN
    assert replay.column(name)[-LENGTH:].tolist() == [False] * LENGTH
    assert replay.column(name)[: len(ENDS)].tolist() == FLAGS


@pytest.mark.parametrize(
    ("rewards", "kind", "fits"),
    [
        (COSTS, "column", False),
        (ONCE, "column", True),
        (GRADED, "column", True),
        (ONCE, "success_minus_one", True),
        (COSTS, None, True),
    ],
)
def test_a_column_of_costs_does_not_share_a_replay_with_rollouts(
    tmp_path: Path, rewards: list[float], kind: RewardKind | None, fits: bool
) -> None:
    """The simulators give 1 at success, which the kind `column` takes as it is."""
    reader = LeRobotReader(config_of(tmp_path / "demos", rewards, kind))
    if fits:
        check_rollouts(reader)
        return
    said = r"/demos gives rewards of -1 to 0 \(kind column\) and rollouts have 0 and 1, .*=success "
    with pytest.raises(UserError, match=said):
        check_rollouts(reader)

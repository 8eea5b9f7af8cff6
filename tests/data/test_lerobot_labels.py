from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_trqam.data.sources.lerobot.labels import Outcome, plan_labels, read_success_labels
from vla_trqam.errors import UserError

from .lerobot_files import LENGTH, Written, open_dataset

FALSE, TRUE = False, True


def read(rows: dict[str, Any], **asked: Any) -> Outcome:
    length = len(next(iter(rows.values()))) if rows else 4
    columns = {name: np.array(values) for name, values in rows.items()}
    columns["frame_index"] = np.arange(length)
    values = columns.get("next.reward")
    plan = plan_labels("The dataset d", columns, reward_values=values, **asked)
    return plan.outcome(columns, 0)


def test_terminated_column_decides_whatever_done_says() -> None:
    rows = {"next.reward": [0, 0, 5.0], "next.done": [FALSE, FALSE, TRUE]}
    cut = read(rows | {"next.terminated": [FALSE, FALSE, FALSE]})
    assert (cut.num_steps, cut.terminated) == (3, False)
    ended = read(rows | {"next.terminated": [FALSE, FALSE, TRUE]})
    assert ended.terminated


def test_truncated_column_tells_done_apart() -> None:
    rows = {"next.reward": [0, 0, 0.5], "next.done": [FALSE, FALSE, TRUE]}
    assert not read(rows | {"next.truncated": [FALSE, FALSE, TRUE]}).terminated
    assert read(rows | {"next.truncated": [FALSE, FALSE, FALSE]}).terminated


def test_done_alone_is_no_termination_unless_the_episode_succeeded() -> None:
    rows = {"next.reward": [0, 0, 0.0], "next.done": [FALSE, FALSE, TRUE]}
    failed = read(rows | {"next.success": [FALSE, FALSE, FALSE]})
    assert (failed.terminated, failed.success) == (False, False)
    solved = read(rows | {"next.success": [FALSE, FALSE, TRUE]})
    assert (solved.terminated, solved.success) == (True, True)


@pytest.mark.parametrize(
    ("rewards", "terminated"),
    [
        ([0, 0, 1], True),
        ([0, 0, 0], False),
        ([-1, -1, 0], True),
        ([-1, -1, -1], False),
        ([0.3, 0.1, 1], False),
    ],
)
def test_rewards_tell_of_success_only_where_they_are_success_rewards(
    rewards: list[float], terminated: bool
) -> None:
    outcome = read({"next.reward": np.array(rewards, np.float32)})
    assert (outcome.terminated, outcome.success) == (terminated, terminated)
    assert outcome.rewards.tolist() == np.array(rewards, np.float32).tolist()


def test_steps_after_the_end_are_left_out() -> None:
    outcome = read({"next.success": [FALSE, TRUE, TRUE, TRUE]})
    assert (outcome.num_steps, outcome.rewards.tolist()) == (2, [0, 1])
    done = read({"next.reward": [0, 2.0, 3, 4], "next.done": [FALSE, FALSE, TRUE, FALSE]})
    assert done.rewards.tolist() == [0, 2, 3]


def test_row_of_the_final_observation_is_no_step() -> None:
    rows = {
        "next.reward": [0, 0.0, 0.0],
        "next.terminated": [FALSE, FALSE, FALSE],
        "is_final_observation": [FALSE, FALSE, TRUE],
    }
    outcome = read(rows)
    assert (outcome.num_steps, outcome.terminated) == (2, False)


def test_terminal_success_rewards_the_last_step() -> None:
    outcome = read({"frame_index": [0, 1, 2]}, reward="terminal_success")
    assert outcome.rewards.tolist() == [0, 0, 1]
    assert outcome.terminated


@pytest.mark.parametrize("label", [False, True])
def test_given_labels_win_over_columns(label: bool) -> None:
    rows = {"next.reward": [7.0, 7], "next.success": [FALSE, not label]}
    outcome = read(rows, successes=[label])
    assert outcome.rewards.tolist() == [0, float(label)]
    assert (outcome.success, outcome.terminated) == (label, label)


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ([], {}, "no reward: .*--dataset.reward=terminal_success.*--dataset.success_labels"),
        (["next.success"], {"reward": "column"}, "no column next.reward"),
        (["next.reward"], {"reward": "success"}, "no column next.success.*success_labels"),
        (
            [],
            {"reward": "dense"},
            "'dense'; choose one of column, progress, success, terminal_success",
        ),
    ],
)
def test_missing_reward_source_is_refused(
    columns: list[str], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_labels("The dataset d", columns, **asked)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["next.reward", "next.terminated", "next.truncated"], "where next.terminated says so"),
        (["next.reward", "next.truncated"], "truncated where next.truncated says so"),
        (["next.success", "next.done"], "terminated where it succeeds"),
        (["next.reward", "next.done"], "all are taken as truncated"),
    ],
)
def test_assumptions_are_said(columns: list[str], words: str) -> None:
    assert words in " ".join(plan_labels("d", columns).notes())


def test_label_file_must_be_a_list_of_booleans(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text("[true, false]")
    assert read_success_labels(path) == [True, False]
    path.write_text("[1, 0]")
    with pytest.raises(UserError, match="JSON list of true and false"):
        read_success_labels(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_success_labels(tmp_path / "absent.json")


# Rewards from another column.


def graded(folder: Path) -> Path:
    """A reward model's column beside a reward that is 1 at the end of every episode."""
    rows = 4 * LENGTH
    end = [float(row % LENGTH == LENGTH - 1) for row in range(rows)]
    extra = {
        "next.reward": ("float32", end),
        "model.progress": ("float32", [r / 10 for r in range(rows)]),
    }
    return Written(extra=extra).write(folder)


def test_rewards_can_be_another_columns(tmp_path: Path) -> None:
    reader = open_dataset(graded(tmp_path / "d"), reward=None, reward_column="model.progress")
    rewards = np.concatenate([episode.rewards for episode in reader.episodes()])
    np.testing.assert_allclose(rewards, np.arange(len(rewards)) / 10, rtol=1e-6)
    assert "reward: the column model.progress" in reader.notes()
    plain = open_dataset(graded(tmp_path / "e"), reward=None)
    assert set(np.concatenate([e.rewards for e in plain.episodes()])) == {0.0, 1.0}


def beside(folder: Path, name: str = "sarm_progress.parquet", **columns: Any) -> str:
    """The file of a reward model as LeRobot's script lays it out, its rows in no order."""
    episodes = np.repeat(np.arange(4), LENGTH)
    table = {
        "index": np.arange(4 * LENGTH),
        "episode_index": episodes,
        "frame_index": np.tile(np.arange(LENGTH), 4),
        "progress_sparse": (0.1 * episodes + np.tile(LEVELS, 4)).astype(np.float32),
        **columns,
    }
    order = np.random.default_rng(0).permutation(4 * LENGTH)
    pq.write_table(pa.table({n: v[order] for n, v in table.items()}), folder / name)
    return name


LEVELS = np.array([0.0, 0.1, 0.3, 0.2, 0.5, 0.6])
PROGRESS = {"reward": "progress", "reward_column": "progress_sparse", "kind": "column"}


def test_progress_of_a_file_beside_is_rewarded_by_what_it_rises_by(tmp_path: Path) -> None:
    """Of an episode that succeeds up to 1, of another up to where it was cut."""
    success = [float(e == 1 and t == LENGTH - 1) for e in range(4) for t in range(LENGTH)]
    folder = Written(extra={"next.success": ("bool", [bool(s) for s in success])}).write(
        tmp_path / "d"
    )
    reader = open_dataset(folder, reward_file=beside(folder), **PROGRESS)
    rises = [0.1, 0.2, -0.1, 0.3, 0.1]
    for number, episode in enumerate(reader.episodes()):
        solved = number == 1
        assert (episode.success, episode.terminated) == (solved, solved)
        last = 1.0 - (0.1 + 0.6) if solved else 0.0
        np.testing.assert_allclose(episode.rewards, [*rises, last], atol=1e-6)
    told = "what the column progress_sparse rises by in a step, up to 1 where it succeeds"
    assert f"reward: {told}" in reader.notes()
    level = open_dataset(folder, reward_file="sarm_progress.parquet", **PROGRESS | {"reward": None})
    np.testing.assert_allclose(level.episode(2).rewards, 0.2 + LEVELS, atol=1e-6)


def test_the_final_state_of_a_cut_episode_has_its_level(tmp_path: Path) -> None:
    extra = {
        "progress": ("float32", list(np.tile(LEVELS, 4))),
        "is_final_observation": (
            "bool",
            [t == LENGTH - 1 for _ in range(4) for t in range(LENGTH)],
        ),
    }
    folder = Written(extra=extra).write(tmp_path / "d")
    reader = open_dataset(folder, **PROGRESS | {"reward_column": "progress"})
    np.testing.assert_allclose(reader.episode(0).rewards, np.diff(LEVELS), atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "settings", "says"),
    [
        ({"progress_sparse": np.full(4 * LENGTH, np.nan)}, {}, "episode 0, frame 0 has nan in"),
        ({"frame_index": np.arange(4 * LENGTH)}, {}, "6 rows of episode 1, whose frames are 0 to"),
        ({}, {"reward_column": "progress_dense"}, "progress_dense"),
        ({}, {"reward_file": "../other.parquet"}, "other.parquet"),
        ({}, {"reward_file": "absent.parquet"}, "absent.parquet"),
        ({}, {"reward_column": None, "reward": None}, "wants --dataset.reward_column"),
        ({}, {"reward_column": None, "reward_file": None}, "name it by --dataset.reward_column"),
        ({}, {"kind": "sparse"}, "--dataset.reward=progress goes with --dataset.kind=column"),
        ({}, {"reward": "success"}, "both say where rewards come from"),
        ({}, {"reward_file": None}, "wants --dataset.reward_file=NAME.parquet"),
    ],
)
def test_progress_that_cannot_be_read_is_refused(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    folder = Written().write(tmp_path / "d")
    given = {"reward_file": beside(folder, **columns), **PROGRESS, **settings}
    with pytest.raises(UserError, match=says):
        open_dataset(folder, **given)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reward_column": "speed"}, "no column of one number 'speed' for --dataset.reward_column"),
        ({"reward_column": "action"}, "no column of one number 'action'"),
        (
            {"reward_column": "model.progress", "reward": "success"},
            "both say where rewards come from",
        ),
    ],
)
def test_a_reward_column_that_cannot_be_is_refused(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        open_dataset(graded(tmp_path / "d"), **{"reward": None, **settings})

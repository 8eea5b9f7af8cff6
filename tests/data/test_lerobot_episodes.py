"""Which episodes of a LeRobotDataset are read, and what is refused of their rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.errors import UserError

from .lerobot_files import (
    DATA,
    EPISODES,
    FPS,
    LENGTH,
    Written,
    edit_column,
    edit_info,
    edit_table,
    level,
    open_dataset,
    setting,
)

ROWS = 4 * LENGTH


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Written().write(tmp_path / "set")


def delete_episode(root: Path, number: int) -> None:
    """As who filters the tables does it: the other episodes keep their numbers."""
    for name in (DATA, EPISODES):
        edit_table(root / name, lambda t: t.filter(pc.field("episode_index") != number))

    def fewer(info: dict[str, Any]) -> None:
        info["total_episodes"] -= 1
        info["total_frames"] -= LENGTH

    edit_info(root, fewer)


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_frames_are_the_episodes_own_where_others_were_deleted(tmp_path: Path, kind: str) -> None:
    root = Written(**{kind: ["front"]}).write(tmp_path / "set")
    whole = list(open_dataset(root).episodes())
    delete_episode(root, 1)
    reader = open_dataset(root)
    left = list(reader.episodes())
    assert len(left) == 3
    for number, episode in zip((0, 2, 3), left, strict=True):
        assert np.array_equal(episode.images["front"], whole[number].images["front"])
        assert episode.observations[:, 0].tolist() == [number] * (LENGTH + 1)
        grey = np.mean(episode.images["front"], axis=(1, 2, 3))
        assert np.abs(grey - [level(number, t) for t in range(LENGTH)]).max() < 3
    (last,) = open_dataset(root, episodes=(3,)).episodes()
    assert np.array_equal(last.images["front"], whole[3].images["front"])


def test_labels_are_of_the_episodes_in_order_where_others_were_deleted(
    root: Path, tmp_path: Path
) -> None:
    delete_episode(root, 1)
    labels = tmp_path / "labels.json"
    labels.write_text("[false, false, true]")
    reader = open_dataset(root, reward=None, success_labels=labels)
    assert [episode.success for episode in reader.episodes()] == [False, False, True]
    (last,) = open_dataset(root, reward=None, success_labels=labels, episodes=(3,)).episodes()
    assert last.success


@pytest.mark.slow
def test_lerobot_reads_the_written_dataset_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = Written(videos=["front"]).write(tmp_path / "set")
    theirs = LeRobotDataset("local/x", root, video_backend="pyav", return_uint8=True)
    episode = open_dataset(root).episode(2)
    for t in range(LENGTH):
        frame = theirs[2 * LENGTH + t]
        assert np.array_equal(frame["front"].permute(1, 2, 0).numpy(), episode.images["front"][t])
        assert frame["observation.state"].tolist() == episode.observations[t].tolist()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((0, 999), "names 999, which does not exist: the first episode is 0, the last is 3.$"),
        ((-1,), "names -1, which does not exist"),
        ((1, 2, 1), "names 1 more than once"),
        ((), "names no episode"),
    ],
)
def test_episodes_that_are_not_there_are_refused_first(
    root: Path, asked: tuple[int, ...], message: str
) -> None:
    (root / DATA).unlink()
    with pytest.raises(UserError, match=f"--dataset.episodes {message}"):
        open_dataset(root, episodes=asked)


def test_a_deleted_episode_does_not_exist(root: Path) -> None:
    delete_episode(root, 1)
    with pytest.raises(UserError, match=r"names 1, .*the last is 3, and 1 between them were del"):
        open_dataset(root, episodes=(1,))


def test_rows_of_episodes_that_are_not_listed_are_left_out_with_a_line(
    root: Path, tmp_path: Path
) -> None:
    data = (root / DATA).read_bytes()
    delete_episode(root, 1)
    (root / DATA).write_bytes(data)
    reader, said = open_dataset(root), list[str]()
    replay = create_replay(tmp_path / "replay", [reader])
    fill(replay, reader, "demonstrations", say=said.append)
    assert replay.observations[:, 0].tolist() == np.repeat([0, 2, 3], LENGTH + 1).tolist()
    assert f"{LENGTH} rows of episodes that meta/episodes does not list" in " ".join(said)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        (
            "observation.state",
            8,
            [0.0, float("nan")],
            r"episode 1, frame 2 has nan in 'observ.*\[1",
        ),
        ("action", 23, [float("-inf"), 0.0], r"episode 3, frame 5 has -inf in 'action'\[0\]"),
        ("action", 9, [None, 0.0], r"episode 1, frame 3 has nothing in 'action'"),
        ("action", 9, None, r"episode 1, frame 3 has nothing in 'action'"),
        ("frame_index", 9, 4, r"episode 1 has 4 in 'frame_index' where 3 comes next"),
        ("episode_index", 9, 2, r"holds 5 rows of episode 1; meta/episodes says that it has 6"),
        ("task_index", 9, 7, r"episode 1, frame 3 has the task_index 7, for which .*tasks.parquet"),
        ("timestamp", 9, float("nan"), r"episode 1, frame 3 has nan in 'timestamp'"),
    ],
)
def test_a_fault_of_a_row_is_named_by_file_episode_frame_and_column(
    root: Path, name: str, row: int, value: object, message: str
) -> None:
    edit_column(root / DATA, name, setting(row, value))
    with pytest.raises(UserError, match=f"{DATA}.*{message}"):
        open_dataset(root)


def test_a_fault_of_an_episode_that_is_not_read_is_none(root: Path) -> None:
    edit_column(root / DATA, "action", setting(9, [float("nan"), 0.0]))
    assert open_dataset(root, episodes=(0, 2, 3)).num_rows == 3 * LENGTH


@pytest.mark.parametrize(("length", "row"), [(1, 9), (3, 9)])
def test_vectors_of_another_length_are_named(root: Path, length: int, row: int) -> None:
    edit_column(root / DATA, "action", setting(row, [0.0] * length), pa.list_(pa.float32()))
    message = f"episode 1, frame 3 has {length} numbers in 'action'; meta/info.json declares 2"
    with pytest.raises(UserError, match=message):
        open_dataset(root)


@pytest.mark.parametrize("name", ["observation.state", "action", "timestamp", "frame_index"])
def test_missing_columns_are_named(root: Path, name: str) -> None:
    edit_table(root / DATA, lambda table: table.drop_columns([name]))
    with pytest.raises(UserError, match=f"{DATA} has no column '{name}'"):
        open_dataset(root)


@pytest.mark.parametrize("name", ["length", "data/file_index", "episode_index"])
def test_missing_columns_of_the_episodes_are_named(root: Path, name: str) -> None:
    edit_table(root / EPISODES, lambda table: table.drop_columns([name]))
    with pytest.raises(UserError, match=f"{EPISODES} has no column '{name}'"):
        open_dataset(root)


@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/tasks.parquet"])
def test_missing_and_damaged_files_are_named(root: Path, name: str) -> None:
    whole = (root / name).read_bytes()
    (root / name).write_bytes(whole[:-60])
    with pytest.raises(UserError, match=f"{name} cannot be read .*finalized"):
        open_dataset(root)
    (root / name).unlink()
    with pytest.raises(UserError, match=r"has no (file )?meta/|has no file data/"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("total_episodes", 5, "lists 4 episodes; meta/info.json says total_episodes is 5"),
        ("total_frames", 25, "lists 24 frames; meta/info.json says total_frames is 25"),
    ],
)
def test_totals_must_be_those_of_the_tables(
    root: Path, name: str, value: int, message: str
) -> None:
    edit_info(root, lambda info: info.update({name: value}))
    with pytest.raises(UserError, match=message):
        open_dataset(root)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("episode_index", 1, 0, "lists episode 0 twice"),
        ("length", 1, 0, "has 0 in 'length' of episode 1"),
        ("data/file_index", 1, -1, "has -1 in 'data/file_index' of episode 1"),
        ("data/file_index", 1, 7, "has no file data/chunk-000/file-007.parquet"),
    ],
)
def test_episodes_that_cannot_be_are_refused(
    root: Path, name: str, row: int, value: int, message: str
) -> None:
    edit_column(root / EPISODES, name, setting(row, value))
    with pytest.raises(UserError, match=message):
        open_dataset(root)


def test_a_timestamp_that_is_off_is_named_whichever_frames_are_decoded(tmp_path: Path) -> None:
    new = [True] * ROWS
    new[9] = False
    written = Written(videos=["front"], extra={"frame_is_new": ("bool", new)})
    root = written.write(tmp_path / "set")
    edit_column(root / DATA, "timestamp", setting(9, 3 / FPS + 0.004))
    message = r"episode 1, frame 3 has the timestamp 0.3040, 0.0040 s off.*tolerance_s=(0\.\d+) "
    with pytest.raises(UserError, match=message) as told:
        open_dataset(root)
    enough = float(str(told.value).split("tolerance_s=")[1].split()[0])
    assert 0.004 < enough < 0.01
    episode = open_dataset(root, tolerance_s=enough).episode(1)
    assert episode.images["front"].shape[0] == LENGTH - 1


def test_a_frame_half_a_step_off_cannot_be_tolerated(root: Path) -> None:
    edit_column(root / DATA, "timestamp", setting(9, 4 / FPS))
    with pytest.raises(UserError, match="more than half of the time between two frames cannot"):
        open_dataset(root)
    with pytest.raises(UserError, match=r"tolerance_s=0.05 must be above 0 and below 0.05"):
        open_dataset(root, tolerance_s=0.5 / FPS)


def test_tasks_that_change_are_refused_when_the_dataset_is_opened(root: Path) -> None:
    edit_column(root / DATA, "task_index", setting(9, 1))
    message = (
        "the task changes at episode 1, frame 3, from 'reach' to 'lift'; "
        "--dataset.task_changes=first .* =frame "
    )
    with pytest.raises(UserError, match=message):
        open_dataset(root)
    with pytest.raises(UserError, match="task_changes is 'last'; choose one of refuse, first, fr"):
        open_dataset(root, task_changes="last")


def filled(root: Path, path: Path, **config: Any) -> Replay:
    reader = open_dataset(root, **config)
    replay = create_replay(path, [reader])
    fill(replay, reader, "demonstrations", say=lambda _: None)
    return replay


def test_tasks_that_change_are_told_as_the_flag_says(root: Path, tmp_path: Path) -> None:
    edit_column(root / DATA, "task_index", lambda _: [0] * 8 + [1] * 4 + [1] * 12)
    first = filled(root, tmp_path / "first", task_changes="first")
    assert first.task_of_episodes() == ["reach", "reach", "lift", "lift"]
    frame = filled(root, tmp_path / "frame", task_changes="frame")
    frame.close()
    frame = Replay.open(tmp_path / "frame")
    # The last state of an episode is its last row's again, for all are taken as terminated.
    rows = np.arange(LENGTH + 1, 2 * (LENGTH + 1))
    assert frame.observation_at(rows)["task"] == ["reach"] * 2 + ["lift"] * 5
    assert first.observation_at(rows)["task"] == ["reach"] * 7
    assert frame.tasks() == first.tasks() == ["lift", "reach"]


def test_a_column_of_texts_is_the_instruction_if_asked(tmp_path: Path) -> None:
    texts = ["go"] * 6 + ["stop"] * 18
    structs = [[{"role": "user", "content": "hi"}]] * ROWS
    extra = {
        "language_instruction": ("string", texts),
        "language_persistent": ("language", structs),
    }
    root = Written(extra=extra).write(tmp_path / "set")
    assert open_dataset(root).episode(0).task == "reach"
    asked = open_dataset(root, instruction="language_instruction")
    assert [episode.task for episode in asked.episodes()] == ["go", "stop", "stop", "stop"]
    for unknown in ("subtask", "language_persistent", "action"):
        with pytest.raises(UserError, match=f"'{unknown}' .* texts are language_instruction"):
            open_dataset(root, instruction=unknown)
    edit_column(root / DATA, "language_instruction", setting(2, "wait"))
    with pytest.raises(UserError, match="changes at episode 0, frame 2, from 'go' to 'wait'"):
        open_dataset(root, instruction="language_instruction")
    edit_column(root / DATA, "language_instruction", setting(2, None))
    with pytest.raises(UserError, match="episode 0, frame 2 has nothing in 'language_instruction'"):
        open_dataset(root, instruction="language_instruction")


def test_dense_rewards_are_refused_when_the_dataset_is_opened(tmp_path: Path) -> None:
    rewards = [0.0] * ROWS
    rewards[9] = 0.25
    success = [t % LENGTH == LENGTH - 1 for t in range(ROWS)]
    dense = {"next.reward": ("float32", rewards)}
    root = Written(extra=dense | {"next.success": ("bool", success)}).write(tmp_path / "both")
    asked = {"reward": None, "kind": "success_minus_one"}
    message = "episode 1, frame 3 has the next.reward 0.25.*: --dataset.reward=success takes them"
    with pytest.raises(UserError, match=message):
        open_dataset(root, **asked)
    mended = open_dataset(root, kind="success_minus_one", reward="success")
    assert mended.episode(1).rewards.tolist() == [0, 0, 0, 0, 0, 1]
    assert open_dataset(root, reward=None, kind="column").episode(1).rewards[3] == 0.25
    root = Written(extra=dense).write(tmp_path / "dense")
    with pytest.raises(
        UserError, match=r"--dataset.success_labels=FILE.json .*dataset.kind=column"
    ):
        open_dataset(root, **asked)


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    extra = {"next.success": ("string", ["no"] * ROWS)}
    root = Written(extra=extra).write(tmp_path / "set")
    with pytest.raises(UserError, match=r"has string in 'next.success', which must"):
        open_dataset(root)
    edit_info(root, lambda info: info["features"]["next.success"].update(shape=[2]))
    with pytest.raises(UserError, match=r"has \[2\] numbers a frame in 'next.success'"):
        open_dataset(root)


def test_episodes_of_which_nothing_can_be_learnt_are_refused(tmp_path: Path) -> None:
    new = [t % LENGTH != 0 for t in range(ROWS)]
    root = Written(extra={"frame_is_new": ("bool", new)}).write(tmp_path / "repeated")
    with pytest.raises(
        UserError, match="episode 0, frame 0 says that its images repeat an earlier"
    ):
        open_dataset(root)
    extra = {"is_final_observation": ("bool", [False] * (ROWS - 1) + [True])}
    root = Written(extra=extra).write(tmp_path / "empty")
    kept = pa.array([True] * (ROWS - LENGTH) + [False] * (LENGTH - 1) + [True])
    edit_table(root / DATA, lambda table: table.filter(kept))
    edit_column(root / DATA, "frame_index", setting(-1, 0))
    edit_column(root / DATA, "timestamp", setting(-1, 0.0))
    edit_column(root / EPISODES, "length", setting(3, 1))
    edit_info(root, lambda info: info.update(total_frames=ROWS - 5))
    with pytest.raises(UserError, match="episode 3 has a final observation and no step before it"):
        open_dataset(root)

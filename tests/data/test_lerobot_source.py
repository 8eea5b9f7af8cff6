"""Real LeRobotDatasets, written and read offline; one file, because the import takes seconds."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.errors import UserError

from .raw_frames import ACTION_DIM, CAMERAS, STATE_DIM, frame_episode

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def episodes() -> list[Episode]:
    return [
        frame_episode(0, 7, terminated=True),
        frame_episode(1, 9, terminated=False, task="put the can"),
        frame_episode(2, 10, terminated=False, every=4),
        frame_episode(3, 6, terminated=True, every=3, final=False),
        frame_episode(4, 8, terminated=False, final=False),
    ]


@pytest.fixture
def replay(tmp_path: Path, episodes: list[Episode]) -> Replay:
    filled = Replay.create(
        tmp_path / "direct",
        observation_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        cameras=CAMERAS,
        capacity=100,
    )
    for episode in episodes:
        filled.add(episode, source="online")
    return filled


def test_a_level_that_was_written_neither_rises_nor_falls_in_a_final_observation(
    tmp_path: Path,
) -> None:
    columns: dict[str, Any] = {"progress": ("float32", ()), "intervention": ("bool", ())}
    replay = Replay.create(
        tmp_path / "direct",
        observation_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        cameras=CAMERAS,
        capacity=100,
        columns=columns,
    )
    level, taken = np.array([0.1, 0.3, 0.2, 0.6], np.float32), np.ones(4, bool)
    cut = replace(
        frame_episode(0, 4, terminated=False), columns={"progress": level, "intervention": taken}
    )
    replay.add(cut, source="online")
    write_lerobot_dataset(replay, tmp_path / "written", repo_id="local/written", fps=10)
    config = LeRobotConfig(
        "local/written", tmp_path / "written", reward="progress", reward_column="progress"
    )
    reader = LeRobotReader(config)
    (read,) = reader.episodes()
    np.testing.assert_allclose(read.rewards, [0.2, -0.1, 0.4, 0.0], atol=1e-6)


def transitions(replay: Replay, short_chunks: Any = "pad") -> Any:
    sampler = replay.sampler(
        chunk_length=4, discount=0.9, short_chunks=short_chunks, reward=RewardSpec("sparse")
    )
    return sampler.gather(np.arange(sampler.num_starts))


def assert_same_transitions(actual: Any, expected: Any, *, atol: float = 0) -> None:
    for name in ("action", "chunk_return", "discount", "terminated", "truncated", "valid"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    bootstraps = ~expected.terminated
    for key in expected.observation:
        if key == "task":
            assert actual.observation[key] == expected.observation[key]
            continue
        torch.testing.assert_close(
            actual.observation[key], expected.observation[key], rtol=0, atol=atol
        )
        torch.testing.assert_close(
            actual.next_observation[key][bootstraps],
            expected.next_observation[key][bootstraps],
            rtol=0,
            atol=atol,
        )


def read_back(root: Path, path: Path, **config: Any) -> tuple[Replay, list[str]]:
    said: list[str] = []
    reader = LeRobotReader(LeRobotConfig("local/rollouts", root=root, **config))
    replay = create_replay(path, [reader])
    fill(replay, reader, "online", say=said.append)
    return replay, said


def test_dataset_of_a_replay_reads_back_to_the_same_transitions(
    replay: Replay, tmp_path: Path
) -> None:
    write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    again, said = read_back(tmp_path / "set", tmp_path / "again")
    for short_chunks in ("pad", "drop"):
        assert_same_transitions(transitions(again, short_chunks), transitions(replay, short_chunks))
    ours, theirs = again.episodes(), replay.episodes()
    for name in ("terminated", "truncated", "success", "num_steps"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert "next.terminated says so" in " ".join(said)
    assert "1 truncated episodes have no observation after their last action" in said[-1]


def test_reading_goes_on_after_an_interruption(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    reader = LeRobotReader(LeRobotConfig("local/rollouts", root=tmp_path / "set"))
    part = create_replay(tmp_path / "part", [reader])
    for episode in list(reader.episodes())[:2]:
        part.add(episode, source="online")
    fill(part, reader, "online", say=lambda line: None)
    assert_same_transitions(transitions(part), transitions(replay))


def test_videos_are_decoded_close_to_what_was_recorded(tmp_path: Path) -> None:
    grid = np.mgrid[0:64, 0:64].sum(0)[None, :, :, None]
    images = np.broadcast_to(grid + 3 * np.arange(13)[:, None, None, None], (13, 64, 64, 3))
    episode = dataclasses.replace(
        frame_episode(0, 12, terminated=False), images={"front": images.astype(np.uint8)}
    )
    replay = Replay.create(
        tmp_path / "direct",
        observation_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        cameras={"front": (64, 64, 3)},
        capacity=50,
    )
    replay.add(episode, source="online")
    replay.add(episode, source="online")
    root = tmp_path / "set"
    write_lerobot_dataset(replay, root, repo_id="local/rollouts", fps=20, use_videos=True)
    assert list(root.rglob("*.mp4"))
    again, _ = read_back(root, tmp_path / "again")
    assert_same_transitions(transitions(again), transitions(replay), atol=8 / 255)
    assert again.num_frames == 26


def test_a_subset_of_episodes_and_cameras_is_read(replay: Replay, tmp_path: Path) -> None:
    write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    some, _ = read_back(tmp_path / "set", tmp_path / "again", episodes=(1, 3), cameras=("wrist",))
    assert some.task_of_episodes() == ["put the can", "lift the cube"]
    assert some.episodes().num_steps.tolist() == [9, 6]
    assert some.cameras == {"wrist": CAMERAS["wrist"]}


def test_the_parts_of_a_dataset_are_its_episodes(replay: Replay, tmp_path: Path) -> None:
    write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    whole = LeRobotReader(LeRobotConfig("local/rollouts", tmp_path / "set"))
    lengths = [len(episode.actions) for episode in whole.episodes()]
    parts = [whole.part(number, 3) for number in range(3)]
    found = [[len(episode.actions) for episode in part.episodes()] for part in parts]
    assert found == [lengths[0::3], lengths[1::3], lengths[2::3]]
    assert sum(part.num_rows for part in parts) == whole.num_rows
    again, _ = read_back(tmp_path / "set", tmp_path / "again")
    assert sum(part.num_frames for part in parts) == whole.num_frames
    assert again.num_frames <= whole.num_frames < whole.num_rows
    with pytest.raises(UserError, match=f"{len(lengths)} episodes for 9 processes"):
        whole.part(0, 9)


def test_interrupted_writing_leaves_no_half_dataset(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Replay, rows: np.ndarray) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "task_of_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    assert not (tmp_path / "set").exists()
    write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)
    with pytest.raises(UserError, match="exists already"):
        write_lerobot_dataset(replay, tmp_path / "set", repo_id="local/rollouts", fps=20)


def bare_dataset(root: Path, extra: dict[str, list[Any]] | None = None) -> None:
    """Two episodes of four rows as LeRobot's own recorder makes them; no reward unless `extra`."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    columns = extra or {}
    kinds = {"next.reward": "float32"}
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    } | {n: {"dtype": kinds.get(n, "bool"), "shape": (1,), "names": None} for n in columns}
    dataset = LeRobotDataset.create("local/bare", fps=10, root=root, features=features)
    for _ in range(2):
        for t in range(4):
            vector = np.full(2, t, np.float32)
            more = {n: np.array([v[t]], kinds.get(n, "bool")) for n, v in columns.items()}
            dataset.add_frame(
                {"observation.state": vector, "action": vector, "task": "reach"} | more
            )
        dataset.save_episode()
    dataset.finalize()


def test_clamped_frames_are_never_next_observations(tmp_path: Path) -> None:
    bare_dataset(tmp_path / "set", {"next.reward": [0, 0, 0, 0], "next.done": [0, 0, 0, 1]})
    replay, said = read_back(tmp_path / "set", tmp_path / "replay")
    batch = transitions(replay)
    assert len(batch) == 0
    assert "2 truncated episodes have no observation after their last action" in said[-1]
    sampler = replay.sampler(
        chunk_length=2, discount=0.9, short_chunks="pad", reward=RewardSpec("column")
    )
    seen = sampler.gather(np.arange(sampler.num_starts))
    assert seen.observation["observation.state"][:, 0].tolist() == [0, 1, 0, 1]
    assert seen.next_observation["observation.state"][:, 0].tolist() == [2, 3, 2, 3]


def test_dataset_without_rewards_is_refused_by_the_flags_that_help(tmp_path: Path) -> None:
    bare_dataset(tmp_path / "set")
    with pytest.raises(UserError, match=r"no reward: .*--dataset.reward=terminal_success"):
        read_back(tmp_path / "set", tmp_path / "replay")
    demos, _ = read_back(tmp_path / "set", tmp_path / "demos", reward="terminal_success")
    assert demos.episodes().success.tolist() == [True, True]
    labels = tmp_path / "labels.json"
    labels.write_text("[false, true]")
    mixed, _ = read_back(tmp_path / "set", tmp_path / "mixed", success_labels=labels)
    assert mixed.episodes().terminated.tolist() == [False, True]
    labels.write_text("[false]")
    with pytest.raises(UserError, match=r"has 1 labels; .* has 2 episodes"):
        read_back(tmp_path / "set", tmp_path / "none", success_labels=labels)


def test_cameras_have_the_policys_names_whatever_the_dataset_calls_them(tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (2,), "names": None}
    picture = {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]}
    cameras = ("front", "observation.images.side")  # the first without the usual beginning
    dataset = LeRobotDataset.create(
        "local/two",
        fps=10,
        root=tmp_path / "set",
        features={"observation.state": vector, "action": vector}
        | dict.fromkeys(cameras, picture)
        | {"next.reward": {"dtype": "float32", "shape": (1,), "names": None}},
    )
    for t in range(3):
        numbers = {key: np.full(2, t, np.float32) for key in ("observation.state", "action")}
        pictures = {c: np.full((8, 8, 3), 50 * i + t, np.uint8) for i, c in enumerate(cameras)}
        reward = {"next.reward": np.array([t == 2], np.float32)}
        dataset.add_frame(numbers | pictures | reward | {"task": "reach"})
    dataset.save_episode()
    dataset.finalize()
    config = LeRobotConfig(
        "local/two",
        tmp_path / "set",
        rename_map={"observation.images.side": "observation.images.top"},
    )
    reader = LeRobotReader(config)
    assert set(reader.cameras) == {"front", "top"}
    assert set(reader.features) == {
        *("observation.state", "action", "observation.images.front", "observation.images.top")
    }
    replay = create_replay(tmp_path / "replay", [reader])
    fill(replay, reader, "dataset", say=lambda _: None)
    assert replay.images("front")[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert replay.images("top")[:, 0, 0, 0].tolist() == [50, 51, 52]


def test_a_camera_that_is_not_there_is_refused(tmp_path: Path) -> None:
    bare_dataset(tmp_path / "set", {"next.reward": [0, 0, 0, 1]})
    with pytest.raises(UserError, match=r"no camera \['top'\]"):
        read_back(tmp_path / "set", tmp_path / "replay", cameras=("top",))


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_version_2_is_refused_by_the_converters_name(tmp_path: Path, version: str) -> None:
    info = tmp_path / "old" / "meta" / "info.json"
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"codebase_version": version}))
    message = rf"version {version}; convert it .*lerobot.scripts.convert_dataset_v21_to_v30"
    with pytest.raises(UserError, match=message):
        read_back(tmp_path / "old", tmp_path / "replay")


def test_folders_without_a_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no meta/info.json"):
        read_back(tmp_path, tmp_path / "replay")


def test_dataset_that_was_never_finalized_is_refused(tmp_path: Path) -> None:
    bare_dataset(tmp_path / "set", {"next.reward": [0, 0, 0, 1]})
    (data,) = (tmp_path / "set" / "data").rglob("*.parquet")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(UserError, match="was its recording finalized"):
        read_back(tmp_path / "set", tmp_path / "replay")

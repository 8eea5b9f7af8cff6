import dataclasses
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.replay_files import Header
from vla_trqam.data.sampling import ChunkSampler, RewardSpec
from vla_trqam.errors import UserError

from .raw_frames import ACTION_DIM, CAMERAS, STATE_DIM, frame_episode

SPARSE = RewardSpec("sparse")


def create(path: Path, **changes: Any) -> Replay:
    sizes: dict[str, Any] = dict(observation_dim=STATE_DIM, action_dim=ACTION_DIM, capacity=200)
    return Replay.create(path, **({**sizes, "cameras": CAMERAS} | changes))


@pytest.fixture
def episodes() -> list[Episode]:
    return [
        frame_episode(0, 7, terminated=True),
        frame_episode(1, 9, terminated=False, task="put the can"),
        frame_episode(2, 10, terminated=False, every=4),
        frame_episode(3, 6, terminated=True, every=3, final=False),
    ]


@pytest.fixture
def replay(tmp_path: Path, episodes: list[Episode]) -> Replay:
    filled = create(tmp_path / "replay")
    for episode in episodes:
        filled.add(episode, source="demonstrations")
    return filled


def assert_holds(replay: Replay, episodes: list[Episode]) -> None:
    assert replay.num_episodes == len(episodes)
    assert replay.num_frames == sum(e.observed.sum() for e in episodes)
    for camera in CAMERAS:
        images = np.concatenate([e.images[camera] for e in episodes])
        assert np.array_equal(replay.images(camera), images)
    assert np.array_equal(replay.observations, np.concatenate([e.observations for e in episodes]))
    assert replay.task_of_episodes() == [e.task for e in episodes]


def slow_chunks(episodes: list[Episode], length: int, *, pad: bool) -> list[tuple[Any, ...]]:
    """(episode, t, n) of every admissible chunk, by the definition."""
    chunks = []
    for number, episode in enumerate(episodes):
        steps = len(episode.actions)
        for t in range(steps):
            n = min(length, steps - t)
            ends = t + n == steps
            if not episode.observed[t] or (n < length and not (pad and episode.terminated)):
                continue
            if episode.observed[t + n] or (ends and episode.terminated):
                chunks.append((number, t, n))
    return chunks


def frame_of(episode: Episode, t: int, camera: str) -> np.ndarray:
    assert episode.observed[t]
    return episode.images[camera][episode.observed[:t].sum()]


def shown(batch: Any, key: str, camera: str, row: int) -> np.ndarray:
    image = getattr(batch, key)[f"observation.images.{camera}"][row]
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_sampler_draws_exactly_the_chunks_whose_ends_were_seen(
    replay: Replay, episodes: list[Episode], length: int, pad: bool
) -> None:
    sampler = replay.sampler(
        chunk_length=length,
        discount=0.9,
        short_chunks="pad" if pad else "drop",
        reward=SPARSE,
    )
    expected = slow_chunks(episodes, length, pad=pad)
    assert sampler.num_starts == len(expected)
    batch = sampler.gather(np.arange(len(expected)))
    for row, (number, t, n) in enumerate(expected):
        episode = episodes[number]
        state = batch.observation["observation.state"]
        assert isinstance(state, torch.Tensor)
        assert np.array_equal(state[row].numpy(), episode.observations[t])
        assert np.array_equal(batch.action[row, :n].numpy(), episode.actions[t : t + n])
        assert batch.observation["task"][row] == episode.task
        assert bool(batch.terminated[row]) == (episode.terminated and t + n == len(episode.actions))
        for camera in CAMERAS:
            seen = shown(batch, "observation", camera, row)
            assert np.array_equal(seen, frame_of(episode, t, camera))
            if not batch.terminated[row]:
                seen = shown(batch, "next_observation", camera, row)
                assert np.array_equal(seen, frame_of(episode, t + n, camera))


def test_images_are_lerobots_floats_or_the_bytes_themselves(replay: Replay) -> None:
    rows = np.array([0, 5])
    floats = replay.observation_at(rows)["observation.images.front"]
    assert isinstance(floats, torch.Tensor)
    assert floats.dtype == torch.float32
    assert floats.shape == (2, 3, 6, 8)
    assert floats.max() <= 1
    raw = replay.observation_at(rows, image_dtype="uint8")["observation.images.front"]
    assert isinstance(raw, torch.Tensor)
    assert raw.dtype == torch.uint8
    assert torch.equal(raw / 255, floats)


def test_reopened_replay_holds_what_was_added(replay: Replay, episodes: list[Episode]) -> None:
    assert_holds(replay, episodes)
    replay.close()
    assert_holds(Replay.open(replay.path), episodes)


def test_each_frame_is_on_the_disk_once(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay", cameras={"front": (64, 64, 3)}, capacity=100_000)
    episode = frame_episode(0, 40, terminated=True)
    images = np.random.default_rng(0).integers(0, 256, (41, 64, 64, 3), dtype=np.uint8)
    episode = dataclasses.replace(episode, images={"front": images})
    replay.add(episode, source="online")
    used = (replay.path / "images.front.npy").stat().st_blocks * 512
    assert images.nbytes <= used < 1.2 * images.nbytes


def numbered(seed: int) -> Episode:
    return frame_episode(seed, 10 + seed % 5, terminated=seed % 2 == 0, task=f"task {seed % 7}")


def write_until_killed(path: Path) -> None:
    replay = create(path, capacity=1_000_000)
    for seed in itertools.count():
        replay.add(numbered(seed), source="online")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_replay_survives_a_kill_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "killed"
    writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(path,))
    writer.start()
    deadline = time.monotonic() + 20
    try:
        while not (path / "replay.json").exists() or Replay.open(path).num_episodes <= 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        writer.kill()
        writer.join()
    replay = Replay.open(path)
    expected = [numbered(seed) for seed in range(replay.num_episodes)]
    assert_holds(replay, expected)
    extra = frame_episode(999, 3, terminated=True, task="another")
    replay.add(extra, source="online")
    assert_holds(Replay.open(path), [*expected, extra])


def test_half_written_episode_is_ignored_and_overwritten(
    replay: Replay, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(header: Header, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Header, "write", die)
        with pytest.raises(KeyboardInterrupt):
            replay.add(frame_episode(77, 9, terminated=True), source="online")
    assert_holds(replay, episodes)
    later = frame_episode(78, 4, terminated=True)
    replay.add(later, source="online")
    assert_holds(Replay.open(replay.path), [*episodes, later])


def test_cutting_back_keeps_the_first_episodes_frames(
    replay: Replay, episodes: list[Episode]
) -> None:
    replay.truncate_to(2)
    assert_holds(replay, episodes[:2])
    replay.add(episodes[3], source="online")
    assert_holds(replay, [*episodes[:2], episodes[3]])


def sampled(sampler: ChunkSampler[Any]) -> int:
    return sampler.num_starts


def test_sampler_sees_episodes_added_later(replay: Replay) -> None:
    sampler = replay.sampler(chunk_length=2, discount=0.9, short_chunks="drop", reward=SPARSE)
    before = sampled(sampler)
    replay.add(frame_episode(5, 8, terminated=False), source="online")
    assert sampled(sampler) == before + 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observed": np.ones(4, bool)}, r"observed of bool \(4,\), not bool \(8,\)"),
        ({"observed": np.arange(8) > 0}, "no frame at its first step"),
        ({"images": {}}, r"cameras \[\], not \['front', 'wrist'\]"),
        (
            {"images": {n: np.zeros((8, *s)) for n, s in CAMERAS.items()}},
            r"float64 \(8, 6, 8, 3\) of the camera front, not uint8",
        ),
    ],
)
def test_bad_frames_are_refused(replay: Replay, changes: Any, message: str) -> None:
    good = frame_episode(0, 7, terminated=True)
    with pytest.raises(UserError, match=message):
        replay.add(dataclasses.replace(good, **changes), source="online")
    assert replay.num_episodes == 4


def test_full_frames_are_refused(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay", frame_capacity=10)
    with pytest.raises(UserError, match="holds 0 of 10 frames and 13 more do not fit"):
        replay.add(frame_episode(0, 12, terminated=True), source="online")


def test_replay_without_images_is_refused_by_name(
    tmp_path: Path, new_buffer: Callable[..., Replay]
) -> None:
    plain = Replay.open(new_buffer().path)
    assert plain.cameras == {}
    with pytest.raises(UserError, match=r"not a replay with images: it has no frames.json"):
        plain.images("front")


def test_images_that_a_replay_of_states_would_lose_are_refused(
    new_buffer: Callable[..., Replay],
) -> None:
    with pytest.raises(UserError, match=r"cameras \['front', 'wrist'\], not \[\]"):
        new_buffer().add(frame_episode(0, 7, terminated=True), source="online")


def test_frames_of_a_replay_that_was_killed_as_it_was_made_do_not_count(tmp_path: Path) -> None:
    create(tmp_path / "replay").close()
    (tmp_path / "replay/replay.json").unlink()
    Replay.create(tmp_path / "replay", observation_dim=1, action_dim=1, capacity=9).close()
    assert Replay.open(tmp_path / "replay").cameras == {}


def test_damaged_frame_header_is_refused(replay: Replay) -> None:
    (replay.path / "frames.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        Replay.open(replay.path)


def test_second_replay_in_a_folder_is_refused(replay: Replay) -> None:
    with pytest.raises(UserError, match="already holds a replay"):
        create(replay.path)
    assert Replay.open(replay.path).num_episodes == 4


def test_a_task_that_changes_is_told_in_each_row(tmp_path: Path) -> None:
    tasks = (*["reach"] * 3, *["lift"] * 5)
    changing = dataclasses.replace(frame_episode(0, 7, terminated=True), task=tasks)
    steady = frame_episode(1, 4, terminated=False, task="lift")
    replay = create(tmp_path / "replay", tasks_of_rows=True)
    for episode in (steady, changing, steady):
        replay.add(episode, source="demonstrations")
    replay.truncate_to(2)
    replay.close()
    again = Replay.open(tmp_path / "replay")
    assert again.observation_at(np.arange(13))["task"] == ["lift"] * 5 + list(tasks)
    assert again.observation_at(np.array([12, 5]))["task"] == ["lift", "reach"]
    assert again.task_of_episodes() == ["lift", "reach"]
    assert again.tasks() == ["lift", "reach"]


def test_tasks_that_a_replay_cannot_hold_are_refused(tmp_path: Path) -> None:
    episode = frame_episode(0, 3, terminated=True)
    replay = create(tmp_path / "replay")
    with pytest.raises(UserError, match="has a task that changes; create the replay with tasks_of"):
        replay.add(dataclasses.replace(episode, task=("a", "a", "b", "b")), source="x")
    with pytest.raises(UserError, match="has 3 tasks, not one for each of 4 rows"):
        replay.add(dataclasses.replace(episode, task=("a", "a", "a")), source="x")
    replay.add(dataclasses.replace(episode, task=("a",) * 4), source="x")
    assert replay.observation_at(np.arange(4))["task"] == ["a"] * 4


def test_a_replay_from_before_tasks_could_change_opens(
    replay: Replay, episodes: list[Episode]
) -> None:
    replay.close()
    path = replay.path / "frames.json"
    header = json.loads(path.read_text())
    assert header.pop("tasks_of_rows") is False
    path.write_text(json.dumps(header))
    assert not (replay.path / "row_tasks.npy").exists()
    assert_holds(Replay.open(replay.path), episodes)

"""A `Replay` written out as a LeRobotDataset (v3), which `source` reads back.

Columns beside state, images, action, task and the replay's further ones: `next.reward`, `next.done`
(either end, as LeRobot's recorders write it), `next.terminated`, `next.truncated`, `next.success`,
and two of ours:
`frame_is_new` is False where a row repeats the images of an earlier one, and
`is_final_observation` is True on the row that a truncated episode has after its last action. That
row shows s_T, from which RL bootstraps; its action is the last one repeated, its reward 0. Of its
further columns a flag is false, for nothing was done, and a number the last one repeated: a level
that is written down neither rises nor falls there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.frames import STATE_KEY, image_key
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.labels import (
    DONE,
    FINAL_OBSERVATION,
    FRAME_IS_NEW,
    REWARD,
    SUCCESS,
    TERMINATED,
    TRUNCATED,
)
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole

_FLAGS = (DONE, TERMINATED, TRUNCATED, SUCCESS, FINAL_OBSERVATION, FRAME_IS_NEW)


def write_lerobot_dataset(
    replay: Replay,
    root: Path,
    *,
    repo_id: str,
    fps: int,
    robot_type: str | None = None,
    use_videos: bool = False,
) -> None:
    """Write every episode of the replay; the folder appears whole or not at all.

    Args:
        replay: with at least one episode.
        root: folder of the dataset; must not exist.
        repo_id: its name, such as "user/rollouts".
        fps: steps per second.
        robot_type: for the dataset's card.
        use_videos: lossy mp4 instead of exact PNG images.

    Raises:
        UserError: the folder exists, or the replay is empty.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if root.exists():
        raise UserError(f"{root} exists already: name another folder for the dataset.")
    if replay.num_episodes == 0:
        raise UserError(f"The replay {replay.path} has no episode to write as a dataset.")
    root.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(root) as part:
        dataset = LeRobotDataset.create(
            repo_id,
            fps=fps,
            root=part,
            robot_type=robot_type,
            use_videos=use_videos,
            features=_features(replay, "video" if use_videos else "image"),
        )
        try:
            for episode in range(replay.num_episodes):
                for frame in _frames(replay, episode):
                    dataset.add_frame(frame)
                dataset.save_episode(parallel_encoding=False)
        finally:
            dataset.finalize()


def write_episodes(
    episodes: Sequence[Episode],
    root: Path,
    *,
    repo_id: str,
    fps: int,
    robot_type: str | None = None,
) -> None:
    """:func:`write_lerobot_dataset` of episodes that are in no replay, with videos.

    Raises:
        UserError: the folder exists, there is no episode, or they show no pictures.
    """
    if not episodes or not episodes[0].images:
        raise UserError(f"{root} would be a dataset without pictures, or without an episode.")
    first = episodes[0]
    with tempfile.TemporaryDirectory() as scratch:
        replay = Replay.create(
            Path(scratch) / "replay",
            observation_dim=first.observations.shape[1],
            action_dim=first.actions.shape[1],
            cameras={name: pictures.shape[1:] for name, pictures in first.images.items()},
            capacity=sum(len(episode.actions) for episode in episodes),
        )
        for episode in episodes:
            replay.add(episode, source="rollouts")
        write_lerobot_dataset(
            replay, root, repo_id=repo_id, fps=fps, robot_type=robot_type, use_videos=True
        )
        replay.close()


def _features(replay: Replay, image_dtype: str) -> dict[str, dict[str, Any]]:
    images = {
        image_key(name): {
            "dtype": image_dtype,
            "shape": shape,
            "names": ["height", "width", "channels"],
        }
        for name, shape in replay.cameras.items()
    }
    vectors = {STATE_KEY: replay.observation_dim, "action": replay.action_dim}
    return (
        {
            key: {"dtype": "float32", "shape": (size,), "names": None}
            for key, size in vectors.items()
        }
        | images
        | {REWARD: {"dtype": "float32", "shape": (1,), "names": None}}
        | {name: {"dtype": "bool", "shape": (1,), "names": None} for name in _FLAGS}
        | {
            name: {"dtype": dtype, "shape": shape or (1,), "names": None}
            for name, (dtype, shape) in replay.columns.items()
        }
    )


def _frames(replay: Replay, episode: int) -> Iterator[dict[str, Any]]:
    """The rows of an episode as `LeRobotDataset.add_frame` takes them."""
    table = replay.episodes(slice(episode, episode + 1))
    step, row, num_steps = (
        int(column[0]) for column in (table.first_step, table.first_observation, table.num_steps)
    )
    terminated, success = bool(table.terminated[0]), bool(table.success[0])
    rows = row + np.arange(num_steps + 1)
    new = replay.frame_index.known(rows)
    frames = replay.frame_index.frames(rows)
    final = not terminated and bool(new[-1])
    tasks = replay.task_of_rows(rows)
    for t in range(num_steps + final):
        is_final, is_end = t == num_steps, t >= num_steps - 1
        taken = step + min(t, num_steps - 1)
        reward = 0.0 if is_final else replay.rewards[taken]
        flags = {
            DONE: is_end,
            TERMINATED: is_end and terminated,
            TRUNCATED: is_end and not terminated,
            SUCCESS: t == num_steps - 1 and success,
            FINAL_OBSERVATION: is_final,
            FRAME_IS_NEW: new[t],
        }
        yield (
            {
                STATE_KEY: np.array(replay.observations[rows[t]]),
                "action": np.array(replay.actions[taken]),
                REWARD: np.array([reward], np.float32),
                "task": tasks[t],
            }
            | {name: np.array([bool(flag)]) for name, flag in flags.items()}
            | {
                image_key(name): replay.pictures(name, frames[t : t + 1])[0]
                for name in replay.cameras
            }
            | {name: _entry(replay.column(name)[taken], is_final) for name in replay.columns}
        )


def _entry(value: np.ndarray, is_final: bool) -> np.ndarray:
    """One row's entry of a further column, as LeRobot takes it."""
    entry = np.array(value).reshape(np.shape(value) or (1,))
    return np.zeros_like(entry) if is_final and entry.dtype == np.bool_ else entry

"""A LeRobotDataset (v3) as RL data: decoded once into a `FrameReplay`. Actions stay raw.

LeRobot is imported inside functions: it costs 10-25 seconds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from vla_trqam.data.frame_files import ImageShape
from vla_trqam.data.frame_replay import (
    IMAGE_PREFIX,
    STATE_KEY,
    FrameEpisode,
    FrameReplay,
    image_key,
)
from vla_trqam.data.lerobot_labels import (
    FINAL_OBSERVATION,
    FRAME_IS_NEW,
    REWARD,
    LabelPlan,
    RewardSource,
    plan_labels,
    read_success_labels,
)
from vla_trqam.errors import UserError

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
_DECODED_AT_A_TIME = 128  # frames: bounds the memory that a long episode takes


@dataclass(frozen=True)
class LeRobotConfig:
    """Which dataset, and what to take from it: the flags `--dataset.*`.

    Attributes:
        repo_id: of the dataset; with `root`, any name.
        root: its local folder; None looks where LeRobot does, and then on the Hub.
        episodes: numbers of those to read; None reads all.
        cameras: to read, without `observation.images.`; None reads all.
        looked_through: a policy's cameras, as renamed; the dataset's others are left unopened.
        reward: where rewards come from; None takes what there is, see `plan_labels`.
        success_labels: a JSON list, one label for each episode of the dataset.
        rename_map: from the dataset's cameras to the policy's, `observation.images.` included.
    """

    repo_id: str
    root: Path | None = None
    episodes: tuple[int, ...] | None = None
    cameras: tuple[str, ...] | None = None
    looked_through: tuple[str, ...] | None = None
    reward: RewardSource | None = None
    success_labels: Path | None = None
    rename_map: Mapping[str, str] = field(default_factory=dict, hash=False)


class LeRobotReader:
    """An opened and checked dataset.

    Attributes:
        plan: what decides about rewards and ends.
        fps: frames per second.
        state_dim: S.
        action_dim: A.
        cameras: name, as renamed -> (height, width, channels).
    """

    def __init__(self, config: LeRobotConfig) -> None:
        """Open the dataset and check that RL can use it.

        Raises:
            UserError: it is missing, damaged, of version 2 or without state, action or rewards; or
                it has not what `config` asks for.
        """
        self.config = config
        self._where = f"The dataset {config.root or config.repo_id}"
        if config.root is not None:
            _check_folder(config.root, config.repo_id)
        self._dataset = self._open()
        features = self._dataset.meta.features
        self.fps = int(self._dataset.meta.fps)
        self.state_dim = self._vector_length(STATE_KEY)
        self.action_dim = self._vector_length("action")
        self.cameras = self._camera_shapes()
        self._table = self._dataset.hf_dataset.with_format("numpy").select_columns(
            [n for n, f in features.items() if f["dtype"] not in ("image", "video", "string")]
        )
        self._scalars = [n for n, f in features.items() if tuple(f["shape"]) == (1,)]
        self._bounds = self._episode_bounds()
        self.plan = self._plan()

    @property
    def features(self) -> dict[str, Any]:
        """State, action and all cameras by a policy's names, each with `dtype` and `shape`."""
        own = self._dataset.meta.features
        cameras = {image_key(name): own[key] for name, key in self._keys.items()}
        return {key: own[key] for key in (STATE_KEY, "action")} | cameras

    @property
    def num_episodes(self) -> int:
        """Episodes to read."""
        return len(self._bounds)

    @property
    def num_rows(self) -> int:
        """Frames to read."""
        return int(sum(stop - start for _, start, stop in self._bounds))

    def part(self, number: int, count: int) -> Self:
        """The same dataset, of whose episodes only every ``count``-th from ``number`` on is read.

        Raises:
            UserError: there are fewer episodes than parts.
        """
        if count > self.num_episodes:
            raise UserError(
                f"{self._where} has {self.num_episodes} episodes for {count} processes; each "
                "needs one at least."
            )
        reader = copy.copy(self)
        reader._bounds = self._bounds[number::count]
        return reader

    @property
    def num_frames(self) -> int:
        """Rows whose images are their own: what is decoded, at most."""
        new = self._table[:].get(FRAME_IS_NEW)
        if new is None:
            return self.num_rows
        return int(sum(np.asarray(new[start:stop]).sum() for _, start, stop in self._bounds))

    def create_replay(
        self, path: Path, *, more_steps: int = 0, more_frames: int = 0
    ) -> FrameReplay:
        """An empty replay with room for this dataset and what is collected later.

        Args:
            path: its folder, made if absent.
            more_steps: collected later.
            more_frames: of them with images.
        """
        return FrameReplay.create(
            path,
            state_dim=self.state_dim,
            action_dim=self.action_dim,
            cameras=self.cameras,
            capacity=self.num_rows + more_steps,
            frame_capacity=self.num_frames + more_frames,
        )

    def load_into(
        self,
        replay: FrameReplay,
        *,
        source: str = "demonstrations",
        say: Callable[[str], None] = print,
    ) -> None:
        """Decode every episode into the replay; goes on where an interrupted call stopped.

        Args:
            replay: from `create_replay`; episodes that it has of this `source` are not read again.
            source: name that the episodes get there.
            say: gets each assumption about rewards and ends, once.

        Raises:
            UserError: an episode cannot be read, or does not fit the replay.
        """
        for note in self.plan.notes():
            say(f"{self._where}: {note}")
        done = int((replay.steps.episodes().source == source).sum())
        left_out, unseen = 0, 0
        for number, (_, start, stop) in enumerate(self._bounds):
            if number < done:
                continue
            episode = self.episode(number)
            replay.add_episode(episode, source=source)
            left_out += max(stop - start - len(episode.actions) - 1, 0)
            unseen += episode.truncated and not episode.observed[-1]
        if left_out:
            say(f"{self._where}: {left_out} rows after the end of their episode are left out")
        if unseen:
            say(
                f"{self._where}: {unseen} truncated episodes have no observation after their last "
                "action; chunks that reach it are left out"
            )

    def episodes(self) -> Iterator[FrameEpisode]:
        """Every episode, in order."""
        for number in range(self.num_episodes):
            yield self.episode(number)

    def episode(self, number: int) -> FrameEpisode:
        """Read and decode one.

        Raises:
            UserError: its frames cannot be decoded, or its task changes on the way.
        """
        index, start, stop = self._bounds[number]
        rows = self._table[start:stop]
        outcome = self.plan.outcome({n: rows[n].reshape(-1) for n in self._scalars}, index)
        num_steps = outcome.num_steps
        seen = np.minimum(np.arange(num_steps + 1), stop - start - 1)
        observed = self._observed(rows, num_steps)
        taken = np.flatnonzero(observed)
        return FrameEpisode(
            states=_matrix(rows[STATE_KEY])[seen],
            images={name: self._decode(name, index, start, taken, rows) for name in self.cameras},
            observed=observed,
            actions=_matrix(rows["action"])[:num_steps],
            rewards=outcome.rewards,
            terminated=outcome.terminated,
            truncated=not outcome.terminated,
            success=outcome.success,
            task=self._task(rows["task_index"], index),
        )

    def _observed(self, rows: dict[str, np.ndarray], num_steps: int) -> np.ndarray:
        """(T + 1,) bool: rows of the dataset whose images are their own."""
        num_rows = len(rows["frame_index"])
        new = rows[FRAME_IS_NEW].reshape(-1) if FRAME_IS_NEW in rows else np.ones(num_rows)
        observed = np.zeros(num_steps + 1, dtype=bool)
        have = min(num_steps + 1, num_rows)
        observed[:have] = new[:have].astype(bool)
        return observed

    def _open(self) -> Any:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.datasets.utils import CompatibilityError

        config = self.config
        episodes = None if config.episodes is None else list(config.episodes)
        try:
            return LeRobotDataset(
                config.repo_id,
                root=config.root,
                episodes=episodes,
                video_backend="pyav",  # LeRobot prints pages where torchcodec finds no FFmpeg
            )
        except CompatibilityError as error:
            raise UserError(_old_version(self._where, "older", config.repo_id)) from error
        except Exception as error:  # datasets, pyarrow and the Hub raise many unrelated kinds
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            ask = "is it whole, and was its recording finalized?"
            if config.root is None:
                ask += (
                    " If it is to come from the Hub, is its name right, and does the Hub answer? A "
                    "folder of this machine is --dataset.root."
                )
            raise UserError(
                f"{self._where} cannot be opened ({type(error).__name__}: {first_line}); {ask}"
            ) from error

    def _plan(self) -> LabelPlan:
        features, config = self._dataset.meta.features, self.config
        successes = None
        if config.success_labels is not None:
            successes = read_success_labels(config.success_labels)
            if len(successes) != self._dataset.meta.total_episodes:
                raise UserError(
                    f"--dataset.success_labels={config.success_labels} has {len(successes)} "
                    f"labels; {self._where} has {self._dataset.meta.total_episodes} episodes."
                )
        return plan_labels(
            self._where,
            self._scalars,
            reward=config.reward,
            successes=successes,
            reward_values=self._rewards_given() if REWARD in features else None,
        )

    def _rewards_given(self) -> np.ndarray:
        """The reward column without the rows that only show a final observation."""
        rewards = np.asarray(self._table[:][REWARD]).reshape(-1)
        if FINAL_OBSERVATION not in self._scalars:
            return rewards
        return rewards[~np.asarray(self._table[:][FINAL_OBSERVATION]).reshape(-1)]

    def _vector_length(self, key: str) -> int:
        feature = self._dataset.meta.features.get(key)
        if feature is None or len(feature["shape"]) != 1:
            raise UserError(f"{self._where} has no vector {key!r}, which every policy here needs.")
        return int(feature["shape"][0])

    def _camera_shapes(self) -> dict[str, ImageShape]:
        meta = self._dataset.meta
        colour = [key for key in meta.camera_keys if key not in meta.depth_keys]
        rename = self.config.rename_map
        strange = sorted(set(rename) - set(colour))
        if strange:
            raise UserError(
                f"--rename_map names {', '.join(strange)}; the cameras of {self._where[0].lower()}"
                f"{self._where[1:]} are {', '.join(sorted(colour))}"
            )
        self._keys = {rename.get(key, key).removeprefix(IMAGE_PREFIX): key for key in colour}
        if len(self._keys) < len(colour):
            raise UserError(f"--rename_map={dict(rename)} gives two cameras one name")
        known = {name: tuple(meta.features[key]["shape"]) for name, key in self._keys.items()}
        wanted = self.config.cameras if self.config.cameras is not None else tuple(known)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UserError(f"{self._where} has no camera {unknown}; it has {sorted(known)}.")
        seen = self.config.looked_through
        return {name: known[name] for name in wanted if seen is None or name in seen}

    def _episode_bounds(self) -> list[tuple[int, int, int]]:
        """(number in the dataset, first row, row after the last) of every episode to read."""
        index = np.asarray(self._table[:]["episode_index"]).reshape(-1)
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        stops = [*starts[1:], len(index)]
        return [(int(index[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]

    def _task(self, task_index: np.ndarray, episode: int) -> str:
        first = task_index.reshape(-1)[0]
        if (task_index.reshape(-1) != first).any():
            raise UserError(f"{self._where}: the task changes within episode {episode}.")
        return str(self._dataset.meta.tasks.iloc[int(first)].name)

    def _decode(
        self, camera: str, episode: int, start: int, taken: np.ndarray, rows: dict[str, np.ndarray]
    ) -> np.ndarray:
        """(F, H, W, C) uint8: the frames at rows `taken` of the episode."""
        meta, key = self._dataset.meta, self._keys[camera]
        frames = np.empty((len(taken), *self.cameras[camera]), np.uint8)
        for first in range(0, len(taken), _DECODED_AT_A_TIME):
            some = taken[first : first + _DECODED_AT_A_TIME]
            if key in meta.video_keys:
                block = self._decode_video(key, episode, rows["timestamp"].reshape(-1)[some])
            else:
                block = self._decode_images(key, start + some)
            frames[first : first + len(some)] = block
        return frames

    def _decode_images(self, key: str, rows: np.ndarray) -> np.ndarray:
        pictures = self._dataset.hf_dataset.with_format(None).select_columns([key])
        return np.stack([np.asarray(picture) for picture in pictures[rows.tolist()][key]])

    def _decode_video(self, key: str, episode: int, timestamps: np.ndarray) -> np.ndarray:
        from lerobot.datasets.video_utils import decode_video_frames

        meta = self._dataset.meta
        begin = meta.episodes[episode][f"videos/{key}/from_timestamp"]
        path = self._dataset.root / meta.get_video_file_path(episode, key)
        try:
            frames = decode_video_frames(
                path,
                [begin + float(t) for t in timestamps],
                self._dataset.tolerance_s,
                self._dataset._video_backend,
                return_uint8=True,
            )
        except Exception as error:  # PyAV, torchcodec and LeRobot raise many unrelated kinds
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} cannot be decoded ({first_line}).") from error
        return frames.permute(0, 2, 3, 1).numpy()


def _check_folder(root: Path, repo_id: str) -> None:
    """Refuse a folder without a v3 dataset before LeRobot looks for it on the Hub."""
    info = root / "meta" / "info.json"
    if not info.is_file():
        raise UserError(f"{root} holds no LeRobotDataset: it has no meta/info.json.")
    try:
        version = str(json.loads(info.read_text())["codebase_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{info} is damaged: it names no codebase_version.") from error
    if version.startswith(("v1", "v2")):
        raise UserError(_old_version(f"The dataset {root}", version, repo_id, root))


def _old_version(where: str, version: str, repo_id: str, root: Path | None = None) -> str:
    place = "" if root is None else f" --root={root} --push-to-hub=false"
    return (
        f"{where} is of version {version}; convert it to v3 by "
        f"`{CONVERTER} --repo-id={repo_id}{place}`."
    )


def _matrix(rows: np.ndarray) -> np.ndarray:
    """(R, D) float32, of columns that LeRobot gives as (R,) where D is 1."""
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), -1)

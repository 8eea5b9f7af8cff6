"""A replay with images: a `ReplayBuffer` for state, action, reward and ends, and frames beside it.

Each frame is kept once, as uint8 (H, W, C); s_t and s_{t+n} of two chunks share it. A frame need
not exist at every step: where rendering is dear, frames are taken only where a chunk begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vla_trqam.data.frame_files import (
    FRAMES_NAME,
    FrameHeader,
    FrameIndex,
    ImageShape,
    cached_arrays,
    image_array,
    limit_cache,
)
from vla_trqam.data.replay import ReplayBuffer
from vla_trqam.data.replay_files import HEADER_NAME, Column
from vla_trqam.data.sampling import ChunkSampler, Observer, RewardSpec, ShortChunks
from vla_trqam.data.transitions import Field
from vla_trqam.errors import UserError

FrameObservation = dict[str, Field]
"""Collated items in LeRobot's raw format: `observation.state` (B, S) float32,
`observation.images.<camera>` (B, C, H, W) and `task`, B texts."""

ImageDtype = Literal["float32", "uint8"]

STATE_KEY, IMAGE_PREFIX, TASK_KEY = "observation.state", "observation.images.", "task"


def image_key(camera: str) -> str:
    """LeRobot's feature of a camera; a name that is one already, as `observation.image`, stays."""
    return camera if camera.startswith("observation.") else IMAGE_PREFIX + camera


@dataclass(frozen=True)
class FrameEpisode:
    """One whole episode of T steps.

    Attributes:
        states: s_0..s_T, (T + 1, S). Where the final state is unknown, repeat the one before and
            let `observed` say so.
        images: camera -> (F, H, W, C) uint8, the F frames that were taken, in order.
        observed: (T + 1,) bool, where these were taken; the first one must be. A state without a
            frame is never shown to the policy.
        actions: as executed, in the environment's units, (T, A).
        rewards: (T,).
        terminated: the task ended the episode at s_T. Wins when both ends are true.
        truncated: a time limit ended it.
        success: the task was solved.
        task: what the policy is told to do; or T + 1 texts, what it is told in s_0..s_T.
    """

    states: np.ndarray
    images: Mapping[str, np.ndarray]
    observed: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    success: bool
    task: str | tuple[str, ...]


class FrameReplay:
    """Episodes with images in a folder. Locking, counting and ends are `steps`', a ReplayBuffer."""

    def __init__(self, steps: ReplayBuffer, header: FrameHeader) -> None:
        """Use `create` or `open`."""
        self.steps = steps
        self.path = steps.path
        self._header = header
        self._columns = {n: Column(self.path, n, spec) for n, spec in header.arrays().items()}

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        state_dim: int,
        action_dim: int,
        cameras: Mapping[str, ImageShape],
        capacity: int,
        frame_capacity: int | None = None,
        tasks_of_rows: bool = False,
    ) -> FrameReplay:
        """Make an empty replay in the folder `path`, which must not hold one yet.

        Args:
            path: folder, made if absent.
            state_dim: S.
            action_dim: A.
            cameras: name -> (height, width, channels); names without the `observation.images.`.
            capacity: largest number of steps. Disk space is taken only as episodes come.
            frame_capacity: largest number of frames; twice the steps if None, which always fits.
            tasks_of_rows: room for tasks that change within an episode.

        Raises:
            UserError: a size is not positive, or the folder already holds a replay.
        """
        folder = Path(path)
        frames = 2 * capacity if frame_capacity is None else frame_capacity
        sizes = {"frame_capacity": (frames,)} | {f"camera {n}": s for n, s in cameras.items()}
        for name, size in sizes.items():
            if min(size) < 1:
                raise UserError(f"The replay's {name} is {size}; every size must be at least 1.")
        for name in cameras:
            if "/" in name:
                raise UserError(f"The camera name {name!r} holds a '/', which files cannot bear.")
        header = FrameHeader(dict(cameras), frames, capacity, tasks_of_rows=tasks_of_rows)
        if capacity >= 1 and not (folder / HEADER_NAME).exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name, spec in header.arrays().items():
                Column.allocate(folder, name, spec)
            header.write(folder)
        # Last, because the folder is a replay from the moment that this header stands.
        steps = ReplayBuffer.create(
            folder, observation_dim=state_dim, action_dim=action_dim, capacity=capacity
        )
        return cls(steps, header)

    @classmethod
    def open(cls, path: str | Path) -> FrameReplay:
        """Open the replay in the folder `path` for reading and appending.

        Raises:
            UserError: there is none, it has no images, or it is damaged.
        """
        steps = ReplayBuffer.open(path)
        header = FrameHeader.read(steps.path)
        if header.step_capacity < steps.capacity:  # more: it was killed as it grew
            raise UserError(f"{steps.path / FRAMES_NAME} belongs to another replay.")
        return cls(steps, header)

    @property
    def cameras(self) -> dict[str, ImageShape]:
        """Name -> (height, width, channels)."""
        return dict(self._header.cameras)

    @property
    def frame_capacity(self) -> int:
        """Largest number of frames."""
        return self._header.frame_capacity

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self.steps.num_episodes

    @property
    def num_frames(self) -> int:
        """Frames that count."""
        rows = self._frame_rows()
        return int(_frame_after(rows[-1])) if len(rows) else 0

    @property
    def frame_index(self) -> FrameIndex:
        """Which frame belongs to which row of `steps.observations`."""
        return FrameIndex(self._frame_rows())

    def images(self, camera: str) -> np.ndarray:
        """Read-only map (num_frames, H, W, C) uint8.

        Raises:
            UserError: there is no such camera.
        """
        if camera not in self._header.cameras:
            known = ", ".join(self._header.cameras) or "none"
            raise UserError(f"The replay {self.path} has no camera {camera!r}; it has {known}.")
        return self._columns[image_array(camera)].rows[: self.num_frames]

    def task_of_episodes(self) -> list[str]:
        """One text an episode, its first."""
        ids = self._columns["episode_tasks"].rows[: self.num_episodes]
        return [self._header.tasks[i] for i in ids]

    def task_of_rows(self, rows: np.ndarray) -> list[str]:
        """One text for each of these rows of `steps.observations`."""
        if self._header.tasks_of_rows:
            ids = self._columns["row_tasks"].rows.take(rows)
        else:
            episode = np.searchsorted(self._first_rows(), rows, side="right") - 1
            ids = self._columns["episode_tasks"].rows.take(episode)
        return [self._header.tasks[i] for i in ids]

    def tasks(self) -> list[str]:
        """Every text that a policy is told in some row, sorted."""
        if not self._header.tasks_of_rows:
            return sorted(set(self.task_of_episodes()))
        ids = self._columns["row_tasks"].rows[: self.steps.num_steps + self.num_episodes]
        return sorted(self._header.tasks[i] for i in np.unique(ids))

    def add_episode(self, episode: FrameEpisode, *, source: str) -> None:
        """Append a whole episode; it counts as soon as this returns.

        Raises:
            UserError: shapes or types disagree, a number is not finite, the episode has no end or
                no step, the replay is full, or another process writes to it.
        """
        self._check(episode)
        self.steps.claim()
        first_frame, first_row = self.num_frames, self.steps.num_steps + self.num_episodes
        ids = self._task_ids(episode.task)
        for camera, images in episode.images.items():
            self._columns[image_array(camera)].write(first_frame, images)
        numbers = FrameIndex.number(episode.observed, first_frame)
        self._columns["frame_rows"].write(first_row, numbers)
        self._columns["episode_tasks"].write(self.num_episodes, ids[:1])
        if self._header.tasks_of_rows:
            every = np.broadcast_to(ids, episode.observed.shape)
            self._columns["row_tasks"].write(first_row, every)
        self.steps.add_episode(
            episode.states,
            episode.actions,
            episode.rewards,
            terminated=episode.terminated,
            truncated=episode.truncated,
            success=episode.success,
            source=source,
        )

    def observation_at(
        self, rows: np.ndarray, *, image_dtype: ImageDtype = "float32"
    ) -> FrameObservation:
        """What is seen at rows of `steps.observations`, in LeRobot's raw format.

        Args:
            rows: (B,). Where no frame was taken, the last one before it is shown.
            image_dtype: float32 in [0, 1] as LeRobotDataset gives, or uint8 to be divided by 255
                on the device, which moves a quarter of the bytes.
        """
        frames = self.frame_index.frames(rows)
        state = self.steps.observations.take(rows, axis=0)
        observation: FrameObservation = {STATE_KEY: torch.from_numpy(state)}
        for camera in self._header.cameras:
            image = torch.from_numpy(self.images(camera).take(frames, axis=0)).permute(0, 3, 1, 2)
            if image_dtype == "float32":
                image = image.float() / 255
            observation[image_key(camera)] = image.contiguous()
        observation[TASK_KEY] = self.task_of_rows(rows)
        return observation

    def sampler(
        self,
        *,
        chunk_length: int,
        discount: float,
        short_chunks: ShortChunks,
        reward: RewardSpec,
        sources: Collection[str] | None = None,
        image_dtype: ImageDtype = "float32",
        observer: Observer[FrameObservation] | None = None,
    ) -> ChunkSampler[FrameObservation]:
        """A sampler of chunks, as `ReplayBuffer.sampler`, with images and task in LeRobot's format.

        A chunk begins only where a frame was taken, and ends where one was unless it terminates.

        Args:
            chunk_length: see `ReplayBuffer.sampler`, as the others up to `sources`.
            discount: γ per step.
            short_chunks: what to do with chunks that the episode's end cuts short.
            reward: what to make of the stored reward.
            sources: draw only from episodes of these sources.
            image_dtype: see `observation_at`.
            observer: what the batch's observations are instead, such as a `FeatureCache`.

        Raises:
            UserError: an argument is outside its range, or the reward does not fit.
        """
        return ChunkSampler(
            self.steps,
            observer or FrameObserver(self, image_dtype),
            chunk_length=chunk_length,
            discount=discount,
            short_chunks=short_chunks,
            reward=reward,
            sources=sources,
        )

    def truncate_to(self, num_episodes: int) -> None:
        """Forget all but the first episodes; see `ReplayBuffer.truncate_to`."""
        self.steps.claim()
        if 0 <= num_episodes < self.num_episodes:
            first_row = self._first_rows()[num_episodes]
            limit_cache(self.path, int(self._frame_rows()[first_row]))
        self.steps.truncate_to(num_episodes)

    def grow(self, capacity: int, frame_capacity: int) -> None:
        """Make room for more steps and frames; see `ReplayBuffer.grow`.

        Samplers and caches that were made before do not know of it.
        """
        steps = max(capacity, self.steps.capacity)
        frames = max(frame_capacity, self.frame_capacity)
        if (steps, frames) == (self.steps.capacity, self.frame_capacity):
            return
        self.steps.claim()
        header = replace(self._header, frame_capacity=frames, step_capacity=steps)
        for name, (shape, _) in header.arrays().items():
            Column.extend(self.path, name, shape[0])
        for name in cached_arrays(self.path):
            Column.extend(self.path, name, frames)
        header.write(self.path)
        self._header = header
        self._columns = {n: Column(self.path, n, spec) for n, spec in header.arrays().items()}
        self.steps.grow(steps)

    def flush(self) -> None:
        """Force everything written to the disk itself."""
        for column in self._columns.values():
            column.sync()
        self.steps.flush()

    def close(self) -> None:
        """Give up the lock on writing. Reading goes on working."""
        self.steps.close()

    def _frame_rows(self) -> np.ndarray:
        return self._columns["frame_rows"].rows[: self.steps.num_steps + self.num_episodes]

    def _first_rows(self) -> np.ndarray:
        """Each episode's first row of `steps.observations`."""
        return self.steps.episodes().first_observation

    def _task_ids(self, task: str | tuple[str, ...]) -> np.ndarray:
        """Positions of the texts, (1,) or (T + 1,); new ones join the header."""
        texts = (task,) if isinstance(task, str) else task
        new = [text for text in dict.fromkeys(texts) if text not in self._header.tasks]
        if new:
            header = replace(self._header, tasks=(*self._header.tasks, *new))
            header.write(self.path)
            self._header = header
        known = {text: number for number, text in enumerate(self._header.tasks)}
        return np.array([known[text] for text in texts], dtype=np.int64)

    def _check(self, episode: FrameEpisode) -> None:
        where = f"Episode {self.num_episodes} of the replay {self.path}"
        rows = (len(episode.actions) + 1,)
        if episode.observed.shape != rows or episode.observed.dtype != bool:
            found = f"{episode.observed.dtype} {episode.observed.shape}"
            raise UserError(f"{where} has observed of {found}, not bool {rows}.")
        if not episode.observed[0]:
            raise UserError(f"{where} has no frame at its first step.")
        if not isinstance(episode.task, str):
            self._check_tasks(where, episode.task, rows)
        frames = int(episode.observed.sum())
        if episode.images.keys() != self._header.cameras.keys():
            raise UserError(
                f"{where} has the cameras {sorted(episode.images)}, not "
                f"{sorted(self._header.cameras)}."
            )
        for camera, images in episode.images.items():
            expected = (frames, *self._header.cameras[camera])
            if images.shape != expected or images.dtype != np.uint8:
                raise UserError(
                    f"{where} has {images.dtype} {images.shape} of the camera {camera}, not uint8 "
                    f"{expected}."
                )
        if self.num_frames + frames > self._header.frame_capacity:
            raise UserError(
                f"The replay {self.path} is full: it holds {self.num_frames} of "
                f"{self._header.frame_capacity} frames and {frames} more do not fit. "
                "Create it with a larger frame_capacity."
            )

    def _check_tasks(self, where: str, tasks: tuple[str, ...], rows: tuple[int]) -> None:
        if len(tasks) != rows[0]:
            raise UserError(f"{where} has {len(tasks)} tasks, not one for each of {rows[0]} rows.")
        if len(set(tasks)) > 1 and not self._header.tasks_of_rows:
            raise UserError(
                f"{where} has a task that changes; create the replay with tasks_of_rows."
            )


class FrameObserver(Observer[FrameObservation]):
    """Images, state and task as they were recorded."""

    def __init__(self, replay: FrameReplay, image_dtype: ImageDtype = "float32") -> None:
        """Observe `replay`; see `FrameReplay.observation_at` for the images' dtype."""
        if image_dtype not in ("float32", "uint8"):
            raise UserError(f"image_dtype is {image_dtype!r}; it must be 'float32' or 'uint8'.")
        self._replay = replay
        self._image_dtype: ImageDtype = image_dtype

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken."""
        return self._replay.frame_index.known(rows)

    def at(self, rows: np.ndarray) -> FrameObservation:
        """The observations at these rows."""
        return self._replay.observation_at(rows, image_dtype=self._image_dtype)


def _frame_after(number: np.integer) -> int:
    """The frame that comes next after a row with this number, see `FrameIndex`."""
    return int(number) + 1 if number >= 0 else -int(number)

"""The frames beside a replay's steps, and what a policy is told at them.

Each frame is kept once, as uint8 (H, W, C); s_t and s_{t+n} of two chunks share it. A frame need
not exist at every step: where rendering is dear, frames are taken only where a chunk begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from vla_trqam.data.episode import Episode, Images, in_parts
from vla_trqam.data.frame_files import (
    FRAMES_NAME,
    FrameHeader,
    FrameIndex,
    ImageShape,
    cached_arrays,
    image_array,
)
from vla_trqam.data.replay_files import Column
from vla_trqam.data.sampling import Observer
from vla_trqam.data.transitions import Field
from vla_trqam.errors import UserError

if TYPE_CHECKING:
    from vla_trqam.data.replay import Replay

FrameObservation = dict[str, Field]
"""Collated items in LeRobot's raw format: `observation.state` (B, S) float32,
`observation.images.<camera>` (B, C, H, W) and `task`, B texts."""

ImageDtype = Literal["float32", "uint8"]

STATE_KEY, IMAGE_PREFIX, TASK_KEY = "observation.state", "observation.images.", "task"


def image_key(camera: str) -> str:
    """LeRobot's feature of a camera; a name that is one already, as `observation.image`, stays."""
    return camera if camera.startswith("observation.") else IMAGE_PREFIX + camera


class FrameLender(Protocol):
    """Where the first frames of a replay lie that has no copy of them."""

    @property
    def num_frames(self) -> int:
        """How many: they have the numbers from 0 on."""

    def pictures(self, cameras: Collection[str], frames: np.ndarray) -> dict[str, np.ndarray]:
        """The frames with these numbers, (F,) -> (F, H, W, C) uint8 of each camera.

        Raises:
            UserError: one cannot be read.
        """


class Frames:
    """The part of a replay's folder that `frames.json` describes.

    What of it counts is the replay's to say: the methods are told how many rows of observations
    or how many episodes do.
    """

    def __init__(self, folder: Path, header: FrameHeader) -> None:
        """Map the arrays of the folder."""
        self._folder = folder
        self.header = header
        self.lender: FrameLender | None = None
        self._columns = {n: Column(folder, n, spec) for n, spec in header.arrays().items()}

    @staticmethod
    def described(
        cameras: Mapping[str, ImageShape],
        frames: int,
        steps: int,
        *,
        tasks_of_rows: bool,
        lent_frames: int = 0,
    ) -> FrameHeader:
        """The header of frames that are yet to be made.

        Raises:
            UserError: a size is not positive, or a camera's name cannot be a file's.
        """
        sizes = {"frame_capacity": (frames,)} | {f"camera {n}": s for n, s in cameras.items()}
        for name, size in sizes.items():
            if min(size) < 1:
                raise UserError(f"The replay's {name} is {size}; every size must be at least 1.")
        for name in cameras:
            if "/" in name:
                raise UserError(f"The camera name {name!r} holds a '/', which files cannot bear.")
        return FrameHeader(
            dict(cameras), frames, steps, tasks_of_rows=tasks_of_rows, lent_frames=lent_frames
        )

    @staticmethod
    def allocate(folder: Path, header: FrameHeader) -> None:
        """Make the files; they are part of a replay once its own header stands."""
        for name, spec in header.arrays().items():
            Column.allocate(folder, name, spec)
        header.write(folder)

    @classmethod
    def beside(cls, folder: Path, step_capacity: int) -> Frames | None:
        """The folder's; None for a replay of states alone.

        Raises:
            UserError: they are damaged.
        """
        if not (folder / FRAMES_NAME).exists():
            return None
        header = FrameHeader.read(folder)
        if header.step_capacity < step_capacity:  # more: it was killed as it grew
            raise UserError(f"{folder / FRAMES_NAME} belongs to another replay.")
        return cls(folder, header)

    def index(self, num_rows: int) -> FrameIndex:
        """Which frame belongs to which of the first rows of observations."""
        return FrameIndex(self._columns["frame_rows"].rows[:num_rows])

    def images(self, camera: str, num_frames: int) -> np.ndarray:
        """Read-only map (num_frames, H, W, C) uint8.

        Raises:
            UserError: there is no such camera.
        """
        if camera not in self.header.cameras:
            known = ", ".join(self.header.cameras) or "none"
            raise UserError(f"The replay {self._folder} has no camera {camera!r}; it has {known}.")
        return self._columns[image_array(camera)].rows[:num_frames]

    def pictures(
        self, cameras: Collection[str], frames: np.ndarray, num_frames: int
    ) -> dict[str, np.ndarray]:
        """Some of the cameras' frames, wherever they lie: (F,) -> (F, H, W, C) uint8 of each.

        Raises:
            UserError: there is no such camera, or a frame that lies elsewhere cannot be had.
        """
        own = {camera: self.images(camera, num_frames) for camera in cameras}
        lent = frames < self.header.lent_frames
        if not lent.any():
            return {camera: kept.take(frames, axis=0) for camera, kept in own.items()}
        if self.lender is None:
            raise UserError(
                f"The first {self.header.lent_frames} frames of the replay {self._folder} lie in "
                "the datasets that it was filled from (--replay.frames=dataset), not in itself."
            )
        theirs = self.lender.pictures(cameras, frames[lent])
        if lent.all():
            return theirs
        found = {}
        for camera, kept in own.items():
            both = np.empty((len(frames), *kept.shape[1:]), np.uint8)
            both[lent] = theirs[camera]
            both[~lent] = kept.take(frames[~lent], axis=0)
            found[camera] = both
        return found

    def tasks_of_episodes(self, episodes: slice | np.ndarray) -> list[str]:
        """One text for each of these episodes, its first."""
        return self._texts(self._columns["episode_tasks"].rows[episodes])

    def tasks_of_rows(self, rows: slice | np.ndarray) -> list[str]:
        """One text for each of these rows of observations, where rows have their own."""
        return self._texts(self._columns["row_tasks"].rows[rows])

    def write(self, episode: Episode, *, number: int, first_row: int, first_frame: int) -> None:
        """Write what is to be episode `number`; the replay's header decides whether it counts."""
        ids = self._task_ids(episode.task)
        observed = episode.where_observed
        for camera, images in episode.images.items():
            for part in in_parts(len(images)):
                column = self._columns[image_array(camera)]
                column.write(first_frame + part.start, images[part])
        self._columns["frame_rows"].write(first_row, FrameIndex.number(observed, first_frame))
        self._columns["episode_tasks"].write(number, ids[:1])
        if self.header.tasks_of_rows:
            self._columns["row_tasks"].write(first_row, np.broadcast_to(ids, observed.shape))

    def extend(self, header: FrameHeader) -> None:
        """Make room for what the larger header says; what is there stays where it is."""
        for name, (shape, _) in header.arrays().items():
            Column.extend(self._folder, name, shape[0])
        for name in cached_arrays(self._folder):
            Column.extend(self._folder, name, header.frame_capacity)
        header.write(self._folder)
        self.header = header
        self._columns = {n: Column(self._folder, n, spec) for n, spec in header.arrays().items()}

    def sync(self) -> None:
        """Wait until the disk itself has everything written."""
        for column in self._columns.values():
            column.sync()

    def check(self, episode: Episode, where: str, num_frames: int) -> None:
        """Whether the episode's frames and tasks can follow the `num_frames` that are there.

        Raises:
            UserError: they cannot; the message begins with `where`.
        """
        rows, observed = episode.num_steps + 1, episode.where_observed
        if observed.shape != (rows,) or observed.dtype != bool:
            found = f"{observed.dtype} {observed.shape}"
            raise UserError(f"{where} has observed of {found}, not bool {(rows,)}.")
        if not observed[0]:
            raise UserError(f"{where} has no frame at its first step.")
        if not isinstance(episode.task, str):
            self._check_tasks(where, episode.task, rows)
        end = num_frames + int(observed.sum())
        if num_frames < self.header.lent_frames:
            check_lent(where, episode.images, end, self.header.lent_frames)
        else:
            self._check_images(where, episode.images, int(observed.sum()))
        if num_frames + observed.sum() > self.header.frame_capacity:
            raise UserError(
                f"The replay {self._folder} is full: it holds {num_frames} of "
                f"{self.header.frame_capacity} frames and {observed.sum()} more do not fit. "
                "Create it with a larger frame_capacity."
            )

    def _check_images(self, where: str, images: Mapping[str, Images], frames: int) -> None:
        check_cameras(where, images, self.header.cameras)
        for camera, seen in images.items():
            expected = (frames, *self.header.cameras[camera])
            if seen.shape != expected or seen.dtype != np.uint8:
                raise UserError(
                    f"{where} has {seen.dtype} {seen.shape} of the camera {camera}, not uint8 "
                    f"{expected}."
                )

    def _check_tasks(self, where: str, tasks: tuple[str, ...], rows: int) -> None:
        if len(tasks) != rows:
            raise UserError(f"{where} has {len(tasks)} tasks, not one for each of {rows} rows.")
        if len(set(tasks)) > 1 and not self.header.tasks_of_rows:
            raise UserError(
                f"{where} has a task that changes; create the replay with tasks_of_rows."
            )

    def _texts(self, ids: np.ndarray) -> list[str]:
        return [self.header.tasks[i] for i in ids]

    def _task_ids(self, task: str | tuple[str, ...]) -> np.ndarray:
        """Positions of the texts, (1,) or (T + 1,); new ones join the header."""
        texts = (task,) if isinstance(task, str) else task
        new = [text for text in dict.fromkeys(texts) if text not in self.header.tasks]
        if new:
            header = replace(self.header, tasks=(*self.header.tasks, *new))
            header.write(self._folder)
            self.header = header
        known = {text: number for number, text in enumerate(self.header.tasks)}
        return np.array([known[text] for text in texts], dtype=np.int64)


class FrameObserver(Observer[FrameObservation]):
    """Images, state and task as they were recorded."""

    def __init__(self, replay: Replay, image_dtype: ImageDtype = "float32") -> None:
        """Observe `replay`; see `Replay.observation_at` for the images' dtype."""
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


def check_lent(where: str, images: Mapping[str, Images], end: int, lent: int) -> None:
    """Whether an episode whose frames lie elsewhere brings none, and lies among these.

    Raises:
        UserError: it does not; the message begins with `where`.
    """
    if images or end > lent:
        raise UserError(
            f"{where} has frames up to number {end} and pictures of {len(images)} cameras; the "
            f"first {lent} frames of its replay lie in the datasets that it is filled from."
        )


def check_cameras(
    where: str, images: Mapping[str, Images], cameras: Mapping[str, ImageShape]
) -> None:
    """Whether an episode was seen by a replay's cameras.

    Raises:
        UserError: it was not; the message begins with `where`.
    """
    if images.keys() != cameras.keys():
        raise UserError(f"{where} has the cameras {sorted(images)}, not {sorted(cameras)}.")

"""The frames beside a replay: which cameras, which tasks, and where each frame lies.

Added to the folder of `vla_trqam.data.replay`, whose header alone decides what counts:

    frames.json              cameras with their (height, width, channels), capacity, task texts
    frame_rows.npy           int64, one number a row of observations.npy: see `FrameIndex`
    episode_tasks.npy        int64, one number an episode: the position of its task's text
    row_tasks.npy            int64, likewise of each row of observations.npy, where the task may
                             change within an episode
    images.<camera>.npy      uint8 (height, width, channels), one row a frame, each frame once; the
                             first `lent_frames` rows are empty, those frames lie elsewhere
    cache.json               the cached features: fingerprint, how many frames have them, shapes
    cache.<name>.npy         one feature, one row a frame; int16 bits where it is bfloat16
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vla_trqam.data.replay_files import ArraySpec
from vla_trqam.errors import UserError
from vla_trqam.files import sync, written_whole

FRAMES_NAME = "frames.json"
CACHE_NAME = "cache.json"
FORMAT = "vla_trqam.frames"
VERSION = 1

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class FrameHeader:
    """What `frames.json` says.

    Attributes:
        cameras: name -> (height, width, channels).
        frame_capacity: largest number of frames.
        step_capacity: largest number of steps, as in the replay's header.
        tasks: the texts; an episode holds the position of its own.
        tasks_of_rows: whether each row holds one too.
        lent_frames: the first so many frames are not here but where they came from.
    """

    cameras: dict[str, ImageShape]
    frame_capacity: int
    step_capacity: int
    tasks: tuple[str, ...] = ()
    tasks_of_rows: bool = False
    lent_frames: int = 0

    def write(self, folder: Path) -> None:
        """Replace the file in one step."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)
        with written_whole(folder / FRAMES_NAME) as part:
            part.write_text(text + "\n")
            sync(part)  # or a power cut could leave the name with nothing in it

    @classmethod
    def read(cls, folder: Path) -> FrameHeader:
        """The folder's header.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        path = folder / FRAMES_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not a replay with images: it has no {FRAMES_NAME}.")
        try:
            values = json.loads(path.read_text())
            found = (values.pop("format"), values.pop("version"))
            cameras = {name: _image_shape(shape) for name, shape in values.pop("cameras").items()}
            tasks = tuple(values.pop("tasks"))
            header = cls(cameras=cameras, tasks=tasks, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: it does not describe frames.") from error
        if found != (FORMAT, VERSION):
            raise UserError(f"{path} is {found}; this version reads {(FORMAT, VERSION)}.")
        return header

    def arrays(self) -> dict[str, ArraySpec]:
        """Name -> shape and dtype of every array that belongs to the frames."""
        images: dict[str, ArraySpec] = {
            image_array(name): ((self.frame_capacity, *shape), np.uint8)
            for name, shape in self.cameras.items()
        }
        numbers: dict[str, ArraySpec] = {
            "frame_rows": ((2 * self.step_capacity,), np.int64),
            "episode_tasks": ((self.step_capacity,), np.int64),
        }
        if self.tasks_of_rows:
            numbers["row_tasks"] = ((2 * self.step_capacity,), np.int64)
        return images | numbers


def image_array(camera: str) -> str:
    """Name of the array that holds the camera's frames."""
    return f"images.{camera}"


def _image_shape(values: object) -> ImageShape:
    height, width, channels = (int(value) for value in values)  # type: ignore[attr-defined]
    return height, width, channels


class FrameIndex:
    """Which frame belongs to which row of the replay's observations.

    A number k >= 0 means that frame k was taken there. A negative number -1 - k means that nothing
    was: between two decisions, or after the last action of a recording that kept no final
    observation. The last frame before it is k.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        """Read `numbers`, the counted part of `frame_rows`, (num_rows,)."""
        self._numbers = numbers

    @property
    def num_frames(self) -> int:
        """How many frames there are: one more than the last number names."""
        if not len(self._numbers):
            return 0
        number = int(self._numbers[-1])
        return number + 1 if number >= 0 else -number

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken at these rows."""
        return self._numbers.take(rows) >= 0

    def frames(self, rows: np.ndarray) -> np.ndarray:
        """(N,) frame taken at each row, or the last one before it."""
        numbers = self._numbers.take(rows)
        return np.where(numbers >= 0, numbers, -1 - numbers)

    def rows_of_frames(self) -> np.ndarray:
        """(F,) the row at which each frame was taken; frames are numbered in order of rows."""
        return np.flatnonzero(self._numbers >= 0)

    @staticmethod
    def number(observed: np.ndarray, first_frame: int) -> np.ndarray:
        """The numbers of an episode's rows.

        Args:
            observed: (T + 1,) bool, whether a frame was taken; the first one must be.
            first_frame: of the episode.

        Returns:
            (T + 1,) int64.
        """
        latest = first_frame - 1 + np.cumsum(observed)
        return np.where(observed, latest, -1 - latest).astype(np.int64)


@dataclass(frozen=True)
class CacheHeader:
    """What `cache.json` says. It is replaced after the rows are written.

    Attributes:
        fingerprint: of what the features depend on.
        num_frames: rows that count.
        features: name -> torch's name of the dtype, shape of a row.
    """

    fingerprint: str
    num_frames: int
    features: dict[str, tuple[str, tuple[int, ...]]]

    def write(self, folder: Path) -> None:
        """Replace the file in one step."""
        with written_whole(folder / CACHE_NAME) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n")
            sync(part)

    @classmethod
    def read(cls, folder: Path) -> CacheHeader | None:
        """The folder's; None if there is none or it is damaged, for a cache can be made again."""
        try:
            values = json.loads((folder / CACHE_NAME).read_text())
            features = {name: (d, tuple(s)) for name, (d, s) in values.pop("features").items()}
            return cls(features=features, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def cached_arrays(folder: Path) -> list[str]:
    """Names of the arrays of cached features, one row a frame."""
    header = CacheHeader.read(folder)
    return [] if header is None else [cache_array(name) for name in header.features]


def cache_array(feature: str) -> str:
    """Name of the array that holds a cached feature."""
    return f"cache.{feature}"


def limit_cache(folder: Path, num_frames: int) -> None:
    """Forget cached features from frame `num_frames` on, which others will overwrite."""
    header = CacheHeader.read(folder)
    if header is not None and header.num_frames > num_frames:
        replace(header, num_frames=num_frames).write(folder)

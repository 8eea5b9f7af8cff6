"""What a LeRobotDataset declares about itself, and which files it may have opened.

A dataset may be a stranger's. `meta/info.json` is read here, as JSON, before any library opens
one of its files: sizes must be sane, and every path must lie in the dataset's own folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

from vla_trqam.errors import UserError

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
INFO_NAME = "meta/info.json"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

LARGEST_INFO = 16 << 20  # bytes
LARGEST_SIDE = 8192  # pixels
LARGEST_VECTOR = 4096
LARGEST_COUNT = 10**9  # frames, episodes, numbers of files
LARGEST_RATE = 1000  # frames per second
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Feature:
    """A column or camera, as declared.

    Attributes:
        dtype: LeRobot's name of it; cameras have "image" or "video".
        shape: of one row; empty where none of whole numbers is declared.
        names: of the shape's sides, where there are any.
        depth: the camera shows distances, no colours.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    depth: bool

    @property
    def is_camera(self) -> bool:
        """Whether it shows colours."""
        return self.dtype in ("image", "video") and not self.depth


@dataclass(frozen=True)
class DatasetInfo:
    """What `meta/info.json` says, as far as it is needed here."""

    fps: float
    total_episodes: int
    total_frames: int
    features: dict[str, Feature]
    data_path: str
    video_path: str | None

    def data_file(self, chunk: int, file: int) -> str:
        """Path in the folder of a table with frames."""
        return self.data_path.format(chunk_index=chunk, file_index=file)

    def video_file(self, key: str, chunk: int, file: int) -> str:
        """Path in the folder of a camera's video."""
        assert self.video_path is not None, "checked with the camera"
        return self.video_path.format(video_key=key, chunk_index=chunk, file_index=file)


class DatasetFolder:
    """A dataset's folder, out of which no path leads.

    The Hub's cache keeps a dataset as links into its own folder `datasets--USER--NAME`, which is
    then the border instead.
    """

    def __init__(self, root: Path) -> None:
        """Look at nothing yet."""
        self.root = root
        found = root.resolve()
        hub = found.parent.name == "snapshots" and found.parents[1].name.startswith("datasets--")
        self._border = found.parents[1] if hub else found

    def file(self, relative: str) -> Path:
        """The path of a file in the folder.

        Raises:
            UserError: it is not there, or lies elsewhere.
        """
        parts = PurePosixPath(relative).parts
        path = self.root / relative
        try:
            inside = path.resolve().is_relative_to(self._border)
            there = path.is_file()
        except (OSError, RuntimeError, ValueError):  # links in a circle, names that no file bears
            inside, there = False, False
        if relative.startswith("/") or ".." in parts or not inside:
            raise UserError(
                f"{relative} of the dataset {self.root} leads out of its folder, and only files in "
                "it are opened."
            )
        if not there:
            raise UserError(f"The dataset {self.root} has no file {relative}: is it whole?")
        return path

    def files(self, pattern: str) -> list[str]:
        """Paths in the folder that match, in order; not looked at yet, see `file`."""
        found = sorted(self.root.glob(pattern))
        return [path.relative_to(self.root).as_posix() for path in found]


def read_info(folder: DatasetFolder, repo_id: str) -> DatasetInfo:
    """Read and check `meta/info.json`.

    Raises:
        UserError: there is none, it is damaged, of another version, or declares what cannot be.
    """
    if not (folder.root / INFO_NAME).exists():
        raise UserError(f"{folder.root} holds no LeRobotDataset: it has no {INFO_NAME}.")
    path = folder.file(INFO_NAME)
    values = _json(path)
    version = values.get("codebase_version")
    if not isinstance(version, str):
        raise UserError(f"{path} is damaged: it names no codebase_version.")
    if version.startswith(("v1", "v2")):
        raise UserError(_old_version(folder.root, version, repo_id))
    if not version.startswith("v3"):
        raise UserError(
            f"The dataset {folder.root} is of version {version[:20]!r}; v3 is what is read here."
        )
    video_path = values.get("video_path", VIDEO_PATH)
    return DatasetInfo(
        fps=_fps(path, values.get("fps")),
        total_episodes=_count(path, "total_episodes", values.get("total_episodes")),
        total_frames=_count(path, "total_frames", values.get("total_frames")),
        features=_features(path, values.get("features")),
        data_path=_template(path, "data_path", values.get("data_path", DATA_PATH), videos=False),
        video_path=None
        if video_path is None
        else _template(path, "video_path", video_path, videos=True),
    )


def plain(text: object, longest: int = 300) -> str:
    """A stranger's text for a message: one line, nothing that a terminal would obey."""
    line = "".join(c if c.isprintable() else "?" for c in str(text).strip())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def image_shape(where: str, name: str, feature: Feature) -> tuple[int, int, int]:
    """A camera's (height, width, channels), which may be declared channel-first.

    The sides' names decide; without names, the only side that can be channels does.

    Raises:
        UserError: it is no picture of a sane size, or nothing tells which side the channels are.
    """
    shape = feature.shape
    if len(shape) != 3:
        raise UserError(
            f"{where} declares the camera {name} with the shape {list(shape)}; a picture has "
            "height, width and channels."
        )
    first = _channels_first(feature)
    if first is None:
        raise UserError(
            f"{where} declares the camera {name} with the shape {list(shape)} and the names "
            f"{list(feature.names) or 'null'}, which do not tell its channels (1, 3 or 4 of them): "
            f'"names": ["height", "width", "channels"] in {INFO_NAME} would.'
        )
    height, width, channels = (*shape[1:], shape[0]) if first else shape
    if _width_first(feature):
        height, width = width, height
    if max(height, width) > LARGEST_SIDE or min(shape) < 1 or channels not in CHANNELS:
        raise UserError(
            f"{where} declares the camera {name} with {height} x {width} pixels of {channels} "
            f"channels; sides of up to {LARGEST_SIDE} and 1, 3 or 4 channels are read here."
        )
    return height, width, channels


def vector_length(where: str, key: str, features: Mapping[str, Feature]) -> int:
    """D of a feature of D numbers.

    Raises:
        UserError: there is none, or it is no vector of a sane length.
    """
    feature = features.get(key)
    if feature is None or len(feature.shape) != 1:
        raise UserError(f"{where} has no vector {key!r}, which every policy here needs.")
    if not 1 <= feature.shape[0] <= LARGEST_VECTOR:
        raise UserError(
            f"{where} declares {key!r} with {feature.shape[0]} numbers; 1 to {LARGEST_VECTOR} are "
            "read here."
        )
    return feature.shape[0]


def _channels_first(feature: Feature) -> bool | None:
    """None where neither names nor sizes tell."""
    names = [name.lower() for name in feature.names]
    named = [name in ("c", "channel", "channels") for name in names]
    if len(named) == 3 and sum(named) == 1 and not named[1]:
        return named[0]
    can_be = [size in CHANNELS for size in feature.shape]
    if can_be[0] != can_be[2]:
        return can_be[0]
    return None


def _width_first(feature: Feature) -> bool:
    """Only where the names say so."""
    initials = [name[:1].lower() for name in feature.names]
    return "w" in initials and "h" in initials[initials.index("w") :]


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_INFO:
        raise UserError(f"{path} is larger than {LARGEST_INFO >> 20} MiB: it is no description.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it names no codebase_version.")
    return values


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fps(path: Path, value: Any) -> float:
    number = isinstance(value, float) or _is_whole(value)
    if not number or not math.isfinite(value) or not 0 < value <= LARGEST_RATE:
        raise UserError(
            f"{path} says fps is {_short(value)}; it must be above 0 and at most {LARGEST_RATE}."
        )
    return float(value)


def _count(path: Path, name: str, value: Any) -> int:
    if not _is_whole(value) or not 1 <= value <= LARGEST_COUNT:
        raise UserError(f"{path} says {name} is {_short(value)}; it must be 1 to {LARGEST_COUNT}.")
    return int(value)


def _features(path: Path, values: Any) -> dict[str, Feature]:
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} is damaged: it names no features.")
    return {name: _feature(path, name, value) for name, value in values.items()}


def _feature(path: Path, name: str, value: Any) -> Feature:
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise UserError(f"{path} is damaged: its feature {_short(name)} names no dtype.")
    if not name.isprintable() or set("/\\") & set(name) or name in ("", ".", ".."):
        raise UserError(f"{path} has the feature {_short(name)}, a name that no folder can bear.")
    shape, names = value.get("shape") or [], value.get("names") or []
    if isinstance(names, dict):  # LeRobot's older robots: {"motors": [...]}
        parts = [part if isinstance(part, list) else [part] for part in names.values()]
        names = [name for part in parts for name in part]
    known = isinstance(shape, list) and all(_is_whole(size) for size in shape)
    named = isinstance(names, list) and all(isinstance(side, str) for side in names)
    # LeRobot has put the mark in either place, under either name.
    infos = [i for i in (value.get("info"), value.get("video_info")) if isinstance(i, dict)]
    marks = ("is_depth_map", "video.is_depth_map")
    return Feature(
        dtype=value["dtype"],
        shape=tuple(shape) if known else (),
        names=tuple(names) if named else (),
        depth=any(info.get(mark) for info in infos for mark in marks),
    )


def _template(path: Path, name: str, text: Any, *, videos: bool) -> str:
    """A path with places for the numbers of chunk and file, and for a camera's name; no others."""
    fields = {"chunk_index", "file_index"} | ({"video_key"} if videos else set())
    if not isinstance(text, str) or not _only_places(text, fields):
        raise UserError(
            f"{path} says {name} is {_short(text)}; it must be a path in the dataset's folder with "
            f"no other places than those of {VIDEO_PATH if videos else DATA_PATH}."
        )
    return text


def _only_places(text: str, fields: Collection[str]) -> bool:
    if len(text) > 500 or text.startswith("/") or "\\" in text or not text.isprintable():
        return False
    try:
        places = [place for place in Formatter().parse(text) if place[1] is not None]
    except ValueError:
        return False
    for _, field, spec, conversion in places:
        width = r"" if field == "video_key" else r"(0?[1-9])?d?"
        if field not in fields or conversion or not re.fullmatch(width, spec or ""):
            return False
    return ".." not in PurePosixPath(text).parts


def _short(value: object) -> str:
    return "missing" if value is None else plain(repr(value), 80)


def _old_version(root: Path, version: str, repo_id: str) -> str:
    return (
        f"The dataset {root} is of version {version}; convert it to v3 by "
        f"`{CONVERTER} --repo-id={repo_id} --root={root} --push-to-hub=false`."
    )

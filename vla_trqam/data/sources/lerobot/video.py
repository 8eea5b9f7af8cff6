"""The pictures of a LeRobotDataset: frames of its videos, and images held by its tables.

A file is opened as what its name says it is and as nothing else: FFmpeg would follow a playlist
that calls itself an mp4. PyAV and Pillow are imported inside functions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.frame_files import ImageShape
from vla_trqam.data.sources.lerobot.safety import plain
from vla_trqam.errors import UserError

VIDEO_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = {"L": 1, "RGB": 3, "RGBA": 4}


@dataclass(frozen=True)
class VideoHeader:
    """What a video says about itself.

    Attributes:
        height: in pixels.
        width: in pixels.
        seconds: of its end; None where it does not say.
    """

    height: int
    width: int
    seconds: float | None


def read_header(path: Path) -> VideoHeader:
    """Look at a video without decoding it.

    Raises:
        UserError: it is none, or damaged.
    """
    with _opened(path) as (container, stream):
        ends = [stream.duration * stream.time_base] if stream.duration else []
        ends += [container.duration / 1_000_000] if container.duration else []
        code = stream.codec_context
        header = VideoHeader(code.height, code.width, float(max(ends)) if ends else None)
    _check_length(path)
    return header


def decode_video(
    path: Path, times: np.ndarray, *, shape: ImageShape, tolerance: float, camera: str
) -> np.ndarray:
    """The frames next to some times, as `lerobot.datasets.video_utils` finds them.

    Args:
        path: of the video.
        times: (F,) seconds.
        shape: declared, (height, width, channels).
        tolerance: seconds that a frame may be away.
        camera: for messages.

    Returns:
        (F, H, W, C) uint8.

    Raises:
        UserError: it is damaged, has other sizes, or no frame at one of the times.
    """
    frames = np.empty((len(times), *shape), np.uint8)
    away = np.full(len(times), np.inf)
    with _opened(path) as (container, stream):
        begin = round(float(times.min()) / stream.time_base) - 1
        container.seek(begin, backward=True, any_frame=False, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            time = float(frame.pts * stream.time_base)
            distance = np.abs(times - time)
            nearer = (distance < tolerance) & (distance < away)
            if nearer.any():
                check_size(str(path), camera, shape, (frame.height, frame.width, 3))
                frames[nearer] = frame.to_ndarray(format="rgb24")
            away = np.minimum(away, distance)
            if time >= times.max():
                break
    lost = np.flatnonzero(~(away < tolerance))
    if lost.size:
        raise UserError(
            f"{path} has no frame of the camera {camera} at {times[lost[0]]:.4f} s: the nearest is "
            f"{away[lost[0]]:.4f} s away, and --dataset.tolerance_s is {tolerance:g}."
        )
    return frames


def decode_image(data: bytes, *, where: str, shape: ImageShape, camera: str) -> np.ndarray:
    """(H, W, C) uint8 of an image's file, turned as it says, which is what LeRobot shows.

    Raises:
        UserError: it is no image of a known format, damaged, or of another size than declared.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
            channels = _MODES.get(picture.mode, 0)
            size = (picture.height, picture.width)
            if sorted(size) != sorted(shape[:2]) or channels != shape[2]:
                check_size(where, camera, shape, (*size, channels), f" ({picture.mode})")
            pixels = np.asarray(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where} holds an image of the camera {camera} that cannot be decoded "
            f"({_first_line(error)}); {', '.join(IMAGE_FORMATS)} are read here."
        ) from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    check_size(where, camera, shape, pixels.shape)
    return pixels


def check_size(
    where: str, camera: str, declared: ImageShape, found: tuple[int, ...], kind: str = ""
) -> None:
    """Refuse a picture whose size is not the declared one.

    Raises:
        UserError: they differ.
    """
    if found != declared:
        raise UserError(
            f"The camera {camera} is declared with {_sides(declared)} (height x width x channels) "
            f"in meta/info.json, and {where} shows {_sides(found)}{kind}."
        )


def _check_length(path: Path) -> None:
    """Refuse an mp4 of which the end is missing: it opens, and fails when it is decoded.

    The file is a row of boxes, each of which begins with its length.
    """
    if VIDEO_FORMATS.get(path.suffix.lower()) not in ("mp4", "mov"):
        return
    size, begin = path.stat().st_size, 0
    with path.open("rb") as file:
        while begin < size:
            file.seek(begin)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length == 0:  # up to the end
                return
            begin += max(length, 8)
    if begin > size:
        raise UserError(f"{path} has {size} of {begin} bytes; is it whole?")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever fails inside is one sentence."""
    import av

    kind = VIDEO_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is not a video that is read here: {', '.join(VIDEO_FORMATS)} are.")
    try:
        options = {"protocol_whitelist": "file"}
        with av.open(str(path), mode="r", format=kind, options=options) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise UserError(f"{path} has no pictures in it that can be decoded; is it whole?")
            yield container, stream
    except (av.FFmpegError, OSError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be decoded ({_first_line(error)}); is it whole?") from error


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _first_line(error: BaseException) -> str:
    return plain((str(error).strip() or type(error).__name__).splitlines()[0])

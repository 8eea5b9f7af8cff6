"""Base and tuned policy side by side, as a video."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla_trqam.files import written_whole

BAND_HEIGHT = 24
"""Pixels above the frames for the labels."""


def write_side_by_side(
    path: Path,
    base_frames: Sequence[np.ndarray],
    tuned_frames: Sequence[np.ndarray],
    *,
    base_label: str,
    tuned_label: str,
    fps: float,
) -> None:
    """Write an mp4 with the base policy on the left and the tuned one on the right.

    The shorter clip holds its last frame. The file appears whole or not at all.

    Args:
        path: of the video; ends in `.mp4`, its folder exists.
        base_frames: (height, width, 3) uint8 each.
        tuned_frames: the same size.
        base_label: drawn over the left half, for example "base: failed".
        tuned_label: drawn over the right half, for example "tuned: success at 3.2 s".
        fps: frames per second.

    Raises:
        ValueError: a clip is empty, frames differ in shape or type, or `path` is no `.mp4`.
    """
    shapes = {(f.shape, str(f.dtype)) for f in (*base_frames, *tuned_frames)}
    if len(base_frames) == 0 or len(tuned_frames) == 0 or len(shapes) != 1:
        raise ValueError(f"both clips need frames of one shape and type, got {shapes}")
    if path.suffix != ".mp4":
        raise ValueError(f"{path} must end in .mp4")
    band = np.hstack([_label_band(base_frames[0], text) for text in (base_label, tuned_label)])
    length = max(len(base_frames), len(tuned_frames))
    with written_whole(path) as part:
        # yuv420p wants even sizes; any player plays it.
        writer: Any = imageio.get_writer(part, fps=fps, macro_block_size=1)
        with writer:
            for k in range(length):
                pair = np.hstack([_held(base_frames, k), _held(tuned_frames, k)])
                writer.append_data(_even(np.vstack([band, pair])))


def _held(frames: Sequence[np.ndarray], k: int) -> np.ndarray:
    return frames[min(k, len(frames) - 1)]


def _even(image: np.ndarray) -> np.ndarray:
    """Repeat the last row and column where needed for an even height and width."""
    return np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")


def _label_band(frame: np.ndarray, text: str) -> np.ndarray:
    """White text on black, as wide as the frame, with a font that fits: (BAND_HEIGHT, W, 3)."""
    width = frame.shape[1]
    image = Image.new("RGB", (width, BAND_HEIGHT))
    draw = ImageDraw.Draw(image)
    size = BAND_HEIGHT - 10
    while size > 6 and draw.textlength(text, font=ImageFont.load_default(size)) > width - 8:
        size -= 1
    draw.text((4, 3), text, fill="white", font=ImageFont.load_default(size))
    return np.asarray(image)

"""The README's picture: a run's success by updates, and base and tuned policy side by side.

    python benchmarks/readme_picture.py outputs/finetune_pi0/DATE

Left the run's own figure of success with its intervals, right the last frame of its first video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from vla_trqam.errors import UserError

Picture = NDArray[np.uint8]


def frame_of(run: Path) -> Picture:
    """The last frame of the run's first video.

    Raises:
        UserError: there is none.
    """
    videos = sorted((run / "videos").glob("*.mp4"))
    if not videos:
        raise UserError(f"{run} has no videos/*.mp4; a run films where off-screen rendering works")
    frames = iio.imread(videos[0])
    return np.asarray(frames[-1], dtype=np.uint8)


def draw(run: Path, output: Path) -> None:
    """Writes the picture.

    Raises:
        UserError: the run lacks its figure or its videos.
    """
    success = run / "plots" / "success.png"
    if not success.is_file():
        raise UserError(f"{success} does not exist; a finished run has it")
    pictures = [np.asarray(iio.imread(success)), frame_of(run)]
    shares = [p.shape[1] / p.shape[0] for p in pictures]
    figure, axes = plt.subplots(1, 2, width_ratios=shares, figsize=(4 * sum(shares), 4), dpi=100)
    for place, picture in zip(axes, pictures, strict=True):
        place.imshow(picture)
        place.axis("off")
    figure.tight_layout(pad=0.2)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for a run that has not what is drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/figures/first_run.png"))
    given = parser.parse_args(arguments)
    try:
        draw(given.run, given.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

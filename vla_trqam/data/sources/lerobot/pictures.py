"""The cameras of a LeRobotDataset: which there are, whether they show what they should, frames."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from vla_trqam.data.frame_files import ImageShape
from vla_trqam.data.frames import IMAGE_PREFIX
from vla_trqam.data.sources.lerobot.episodes import EpisodeTable, VideoPart
from vla_trqam.data.sources.lerobot.hub import DatasetPlace
from vla_trqam.data.sources.lerobot.rows import EpisodeRows
from vla_trqam.data.sources.lerobot.safety import DatasetFolder, DatasetInfo, Feature, image_shape
from vla_trqam.data.sources.lerobot.tables import ParquetTable
from vla_trqam.data.sources.lerobot.video import (
    check_size,
    decode_image,
    decode_video,
    read_header,
)
from vla_trqam.errors import UserError


class Pictures:
    """The cameras that show colours. Only what is asked for is opened.

    Attributes:
        names: the policy's of each -> the dataset's.
    """

    def __init__(
        self,
        where: str,
        place: DatasetPlace,
        folder: DatasetFolder,
        info: DatasetInfo,
        table: EpisodeTable,
        rename_map: Mapping[str, str],
        renamed_by: str,
    ) -> None:
        """Find the cameras; nothing of them is opened.

        Raises:
            UserError: the map names a camera that is not there, or gives two of them one name.
        """
        self._where, self._place, self._folder = where, place, folder
        self._info, self._table = info, table
        colour = [key for key, feature in info.features.items() if feature.is_camera]
        strange = sorted(set(rename_map) - set(colour))
        if strange:
            raise UserError(
                f"{renamed_by} names {', '.join(strange)}; the cameras of {where[0].lower()}"
                f"{where[1:]} are {', '.join(sorted(colour)) or 'none'}"
            )
        self.names = {rename_map.get(key, key).removeprefix(IMAGE_PREFIX): key for key in colour}
        if len(self.names) < len(colour):
            raise UserError(f"{renamed_by}={dict(rename_map)} gives two cameras one name")
        self._opened: ParquetTable | None = None

    def feature(self, camera: str) -> Feature:
        """What is declared of a camera."""
        return self._info.features[self.names[camera]]

    def shapes(
        self, wanted: Collection[str] | None, seen: Collection[str] | None
    ) -> dict[str, ImageShape]:
        """(height, width, channels) of some cameras.

        Args:
            wanted: they must be there; None takes all.
            seen: none but these is taken; None leaves none out.

        Raises:
            UserError: there is no such camera, or what is declared of it cannot be.
        """
        names = self.names if wanted is None else wanted
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise UserError(f"{self._where} has no camera {unknown}; it has {sorted(self.names)}.")
        return {
            name: image_shape(self._where, name, self.feature(name))
            for name in names
            if seen is None or name in seen
        }

    def check(
        self, camera: str, shape: ImageShape, rows: Sequence[EpisodeRows], tolerance: float
    ) -> None:
        """Look at the first picture of each of a camera's files, without decoding a video.

        Raises:
            UserError: a file is missing or damaged, its pictures are of another size, or it does
                not show the episodes that it should.
        """
        if self.feature(camera).dtype == "image":
            for first in {episode.file: episode for episode in reversed(rows)}.values():
                self._decode_images(camera, shape, first, np.array([0]))
            return
        parts = [(r.number, r.length, self._part(camera, r)) for r in rows]
        check_parts(self._where, self.names[camera], parts, self._info.fps)
        self._place.fetch(sorted({part.file for *_, part in parts}))
        for file in sorted({part.file for *_, part in parts}):
            header = read_header(self._folder.file(file))
            check_size(file, camera, shape, (header.height, header.width, 3))
            ends = {
                part.begin + (length - 1) / self._info.fps: number
                for number, length, part in parts
                if part.file == file
            }
            last = max(ends)
            if header.seconds is not None and header.seconds < last - tolerance:
                raise UserError(
                    f"{self._where}: {file} ends at {header.seconds:.3f} s, before the last frame "
                    f"of episode {ends[last]} at {last:.3f} s; is it whole?"
                )

    def decode(
        self,
        camera: str,
        shape: ImageShape,
        episode: EpisodeRows,
        taken: np.ndarray,
        tolerance: float,
    ) -> np.ndarray:
        """Some frames of an episode.

        Args:
            camera: which.
            shape: declared.
            episode: whose.
            taken: (F,) rows of the episode, increasing.
            tolerance: seconds that a frame may be away.

        Returns:
            (F, H, W, C) uint8.

        Raises:
            UserError: they cannot be decoded.
        """
        if self.feature(camera).dtype == "image":
            return self._decode_images(camera, shape, episode, taken)
        return self._decode_video(camera, shape, episode, taken, tolerance)

    def _part(self, camera: str, episode: EpisodeRows) -> VideoPart:
        if self._info.video_path is None:
            raise UserError(
                f"{self._where} has the video {self.names[camera]!r}; its meta/info.json has no "
                "video_path."
            )
        return self._table.video(episode.position, self.names[camera])

    def _decode_video(
        self,
        camera: str,
        shape: ImageShape,
        episode: EpisodeRows,
        taken: np.ndarray,
        tolerance: float,
    ) -> np.ndarray:
        part = self._part(camera, episode)
        self._place.fetch([part.file])
        times = part.begin + episode.times[taken]
        path = self._folder.file(part.file)
        try:
            return decode_video(path, times, shape=shape, tolerance=tolerance, camera=camera)
        except UserError as error:
            raise UserError(f"Episode {episode.number} of the dataset: {error}") from error

    def _decode_images(
        self, camera: str, shape: ImageShape, episode: EpisodeRows, taken: np.ndarray
    ) -> np.ndarray:
        if self._opened is None or self._opened.path != episode.file:
            self._opened = ParquetTable(episode.file)
        places = dict(zip(episode.rows.tolist(), range(episode.length), strict=True))
        files = self._opened.images(
            self.names[camera],
            episode.rows[taken],
            lambda row: f"episode {episode.number}, frame {places[row]}",
        )
        frames = [
            decode_image(
                data,
                where=f"{episode.file}: episode {episode.number}, frame {frame}",
                shape=shape,
                camera=camera,
            )
            for frame, data in zip(taken, files, strict=True)
        ]
        return np.stack(frames)


def check_parts(
    where: str, key: str, parts: Sequence[tuple[int, int, VideoPart]], fps: float
) -> None:
    """Refuse videos whose parts are too short for their episodes, or belong to two of them.

    A part comes with its episode's number and rows.

    Raises:
        UserError: one is. Episodes that show the same part from the same moment on are let be.
    """
    frame = 1 / fps
    for number, length, part in parts:
        if part.end - part.begin < (length - 1.5) * frame:
            raise UserError(
                f"{where}: the video of {key!r} has {part.end - part.begin:.3f} s for episode "
                f"{number}, whose {length} frames take {length * frame:.3f} s."
            )
    for (one, length, first), (other, _, second) in _neighbours(parts):
        lies_over = first.begin + (length - 0.5) * frame > second.begin
        if lies_over and second.begin > first.begin + 0.5 * frame:
            raise UserError(
                f"{where}: {first.file} shows episode {one} from {first.begin:.3f} s on for "
                f"{length} frames, and episode {other} from {second.begin:.3f} s on: one of them "
                "would get the other's frames."
            )


def _neighbours(
    parts: Sequence[tuple[int, int, VideoPart]],
) -> Iterator[tuple[tuple[int, int, VideoPart], tuple[int, int, VideoPart]]]:
    ordered = sorted(parts, key=lambda part: (part[2].file, part[2].begin))
    for one, other in pairwise(ordered):
        if one[2].file == other[2].file:
            yield one, other

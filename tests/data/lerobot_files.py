"""LeRobotDatasets with known contents, written without LeRobot, and what spoils them.

State of episode e at frame t is (e, t), its action (t, e), its picture of grey level `level(e, t)`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader

FPS, LENGTH, SIDE = 10, 6, 32
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
TASKS, VIDEO = "meta/tasks.parquet", "videos/{}/chunk-000/file-000.mp4"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def level(episode: int, frame: int) -> int:
    """Far apart between episodes, so that another one's picture shows."""
    return 20 + 40 * episode + 4 * frame


def picture(episode: int, frame: int, shape: Sequence[int] = (SIDE, SIDE, 3)) -> np.ndarray:
    return np.full(shape, level(episode, frame), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(held, "PNG")
    return held.getvalue()


@dataclass
class Written:
    """A dataset to write.

    Attributes:
        episodes: their numbers.
        images: names of cameras held by the tables.
        videos: names of cameras with videos.
        extra: further columns, name -> dtype in info.json and values of all rows.
    """

    episodes: Sequence[int] = (0, 1, 2, 3)
    images: Sequence[str] = ()
    videos: Sequence[str] = ()
    extra: dict[str, tuple[str, Sequence[Any]]] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        for name in (DATA, EPISODES):
            (root / name).parent.mkdir(parents=True)
        pq.write_table(self._rows(), root / DATA)
        pq.write_table(self._table(), root / EPISODES)
        tasks = pa.table({"task_index": [0, 1], "task": ["reach", "lift"]})
        pq.write_table(tasks, root / TASKS)
        for camera in self.videos:
            write_video(root / VIDEO.format(camera), (picture(*row) for row in self._frames()))
        (root / "meta/info.json").write_text(json.dumps(self._info()))
        return root

    def _frames(self) -> list[tuple[int, int]]:
        return [(episode, frame) for episode in self.episodes for frame in range(LENGTH)]

    def _rows(self) -> pa.Table:
        frames = self._frames()
        episode, frame = (np.array(part, np.int64) for part in zip(*frames, strict=True))
        vectors = {"observation.state": (episode, frame), "action": (frame, episode)}
        columns: dict[str, Any] = {
            name: pa.array(np.stack(pair, 1).astype(np.float32).tolist(), pa.list_(pa.float32(), 2))
            for name, pair in vectors.items()
        }
        columns |= {
            "timestamp": (frame / FPS).astype(np.float32),
            "frame_index": frame,
            "episode_index": episode,
            "index": np.arange(len(frames)),
            "task_index": np.zeros(len(frames), np.int64),
        }
        for camera in self.images:
            held = [{"bytes": png(picture(*row)), "path": None} for row in frames]
            columns[camera] = pa.array(held, IMAGE)
        return pa.table(columns | {name: values for name, (_, values) in self.extra.items()})

    def _table(self) -> pa.Table:
        count = len(self.episodes)
        begin = np.arange(count) * LENGTH
        columns: dict[str, Any] = {
            "episode_index": list(self.episodes),
            "length": [LENGTH] * count,
            "dataset_from_index": begin,
            "dataset_to_index": begin + LENGTH,
        }
        for place in ["data", *(f"videos/{camera}" for camera in self.videos)]:
            columns |= {f"{place}/chunk_index": [0] * count, f"{place}/file_index": [0] * count}
        for camera in self.videos:
            columns[f"videos/{camera}/from_timestamp"] = begin / FPS
            columns[f"videos/{camera}/to_timestamp"] = (begin + LENGTH) / FPS
        return pa.table(columns)

    def _info(self) -> dict[str, Any]:
        vector = {"dtype": "float32", "shape": [2], "names": None}
        features: dict[str, Any] = {"observation.state": vector, "action": vector}
        for dtype, cameras in (("image", self.images), ("video", self.videos)):
            for camera in cameras:
                names = ["height", "width", "channels"]
                features[camera] = {"dtype": dtype, "shape": [SIDE, SIDE, 3], "names": names}
        own = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
        kinds = {name: dtype for name, (dtype, _) in self.extra.items()}
        for name, dtype in ({"timestamp": "float32"} | own | kinds).items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "fps": FPS,
            "features": features,
            "total_episodes": len(self.episodes),
            "total_frames": len(self.episodes) * LENGTH,
            "total_tasks": 2,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        }


def write_video(path: Path, pictures: Iterable[np.ndarray], *, index_first: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream = None
        for pixels in pictures:
            if stream is None:
                stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "2"})
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        assert stream is not None
        container.mux(stream.encode())


def edit_info(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))


def edit_table(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path)


def edit_column(path: Path, name: str, edit: Callable[[list[Any]], Any], kind: Any = None) -> None:
    """`edit` changes the list of values, or returns another."""

    def edited(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values = edit(values) or values
        number = table.column_names.index(name)
        return table.set_column(
            number, name, pa.array(values, kind or table.schema.field(name).type)
        )

    edit_table(path, edited)


def setting(row: int, value: Any) -> Callable[[list[Any]], None]:
    def edit(values: list[Any]) -> None:
        values[row] = value

    return edit


def open_dataset(root: Path, **config: Any) -> LeRobotReader:
    """Opened with rewards that every dataset has, unless asked for others."""
    wanted = {"reward": "terminal_success"} | config
    return LeRobotReader(LeRobotConfig("local/x", root, **wanted))

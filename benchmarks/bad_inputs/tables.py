"""Ways to spoil a copy of a LeRobotDataset, for the rows of the table of malformed input."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bad_inputs.place import cut, edit_json, replace

Change = Callable[[Path], object]
"""Spoils a copy of the packed dataset."""

INFO, TASKS = "meta/info.json", "meta/tasks.parquet"
EPISODES, DATA = (f"{place}/chunk-000/file-000.parquet" for place in ("meta/episodes", "data"))
CAMERA = "observation.images.agentview"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
FROM, TO = f"videos/{CAMERA}/from_timestamp", f"videos/{CAMERA}/to_timestamp"


def in_info(change: Callable[[Any], object]) -> Change:
    return lambda root: edit_json(root / INFO, change)


def in_table(name: str, change: Callable[[pa.Table], pa.Table]) -> Change:
    def spoil(root: Path) -> None:
        buffer = io.BytesIO()
        pq.write_table(change(pq.read_table(root / name)), buffer)
        replace(root / name, buffer.getvalue())

    return spoil


def without(name: str, *columns: str) -> Change:
    return in_table(name, lambda table: table.drop_columns(list(columns)))


def with_values(name: str, column: str, change: Callable[[list[Any]], object]) -> Change:
    """Changes a column as a list, in place; its type stays if its values still have it."""

    def edit(table: pa.Table) -> pa.Table:
        values, kind = table[column].to_pylist(), table.schema.field(column).type
        change(values)
        try:
            array = pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            array = pa.array(values)
        return table.set_column(table.schema.get_field_index(column), column, array)

    return in_table(name, edit)


def at(row: int, value: Any, dimension: int | None = None) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        if dimension is None:
            values[row] = value
        else:
            values[row] = [*values[row][:dimension], value, *values[row][dimension + 1 :]]

    return change


def every(value: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[:] = [value(old) for old in values]

    return change


def rewritten(name: str, content: str | bytes) -> Change:
    return lambda root: replace(root / name, content)


def removed(name: str) -> Change:
    return lambda root: (root / name).unlink()


def halved(name: str) -> Change:
    return lambda root: cut(root / name)


def all_of(*changes: Change) -> Change:
    def spoil(root: Path) -> None:
        for change in changes:
            change(root)

    return spoil


def undeclared(*columns: str) -> Change:
    """Columns that are in neither the declaration nor the table."""

    def forget(info: Any) -> None:
        for column in columns:
            del info["features"][column]

    return all_of(in_info(forget), without(DATA, *columns))


def feature(key: str, **values: Any) -> Change:
    return in_info(lambda info: info["features"][key].update(values))


def other_video(size: int, frames: int) -> Change:
    def spoil(root: Path) -> None:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as file:
            stream = file.add_stream("mpeg4", rate=20)
            stream.width = stream.height = size
            for _ in range(frames):
                picture = np.zeros((size, size, 3), np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        replace(root / VIDEO, buffer.getvalue())

    return spoil


def swap(first: int, second: int) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[first], values[second] = values[second], values[first]

    return change


def other_task(tasks: pa.Table) -> pa.Table:
    return pa.table({"task_index": [1], "task": ["put it down"]}).cast(
        tasks.select(["task_index", "task"]).schema
    )


def in_picture(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the first picture's entry in the table: its bytes, or a path in their place."""

    def edit(values: list[Any]) -> None:
        values[0] = dict(values[0])
        change(values[0])

    return with_values(DATA, CAMERA, edit)


def picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()

"""The Parquet files of a LeRobotDataset: columns as numpy arrays, each fault as one sentence.

Only the columns that are asked for are read, and only if the file can hold what it declares.
Pyarrow is imported inside functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.sources.lerobot.safety import plain
from vla_trqam.errors import UserError

Place = Callable[[int], str]
"""Names a row of a table for a message, as "episode 3, frame 17"."""

LONGEST_TEXT = 10_000  # characters of an instruction
LARGEST_RATIO = 100  # of a file's content to the file; numbers and images have less than 10
ALWAYS_UNPACKED = 64 << 20  # bytes


@dataclass(frozen=True)
class Tasks:
    """What `meta/tasks.parquet` says: the texts by task_index."""

    path: Path
    texts: dict[int, str]


class ParquetTable:
    """A Parquet file; nothing but its description is read before columns are asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it cannot be read, or declares more rows than it has bytes.
        """
        import pyarrow.parquet

        self.path = path
        self._held: dict[str, tuple[int, Any]] = {}
        with _one_sentence(self.path):
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=False)
            self._schema = self._file.schema_arrow
            self._leaves = dict(self._find_leaves())
            self.num_rows, unpacked = self._declared()
        size = path.stat().st_size
        for what, count, most in (
            ("rows", self.num_rows, size),
            ("bytes unpacked", unpacked, max(LARGEST_RATIO * size, ALWAYS_UNPACKED)),
        ):
            if not 0 <= count <= most:
                raise UserError(
                    f"{path} declares {count} {what} and has {size} bytes, too few for them."
                )

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._schema.names)

    def numbers(self, name: str, width: int, place: Place) -> np.ndarray:
        """A column of `width` numbers a row.

        Returns:
            (R, D), of the column's own type.

        Raises:
            UserError: it is missing, or a row has another length or is empty.
        """
        import pyarrow as pa

        array = self._read(name)
        self._check_filled(name, array, place)
        if pa.types.is_fixed_size_list(array.type) or _is_list(array.type):
            lengths = self._lengths(array)
            wrong = np.flatnonzero(lengths != width)
            if wrong.size:
                raise UserError(
                    f"{self.path}: {place(int(wrong[0]))} has {lengths[wrong[0]]} numbers in "
                    f"{name!r}; meta/info.json declares {width}."
                )
            array = array.flatten()
            self._check_filled(name, array, lambda number: place(number // width))
        elif width != 1:
            raise UserError(
                f"{self.path} has one {plain(array.type)} a row in {name!r}; meta/info.json "
                f"declares {width} numbers."
            )
        kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
        if not any(kind(array.type) for kind in kinds):
            raise UserError(
                f"{self.path} has {plain(array.type)} in {name!r}, which must be of numbers."
            )
        return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(-1, width)

    def whole_numbers(self, name: str, place: Place) -> np.ndarray:
        """(R,) int64.

        Raises:
            UserError: as `numbers`, or the column is not of whole numbers.
        """
        values = self.numbers(name, 1, place)[:, 0]
        if values.dtype.kind not in "iu":
            raise UserError(f"{self.path} has {values.dtype} in {name!r}, not whole numbers.")
        return values.astype(np.int64)

    def texts(self, name: str, place: Place) -> list[str]:
        """One text a row.

        Raises:
            UserError: it is missing, of something else, or a row is empty.
        """
        import pyarrow as pa

        self._leaves_of(name)
        if not self.is_text(name):
            kind = self._schema.field(name).type
            raise UserError(f"{self.path} has {plain(kind)} in {name!r}, which must be of texts.")
        array = self._read(name, encoded=True)
        self._check_filled(name, array, place)
        with _one_sentence(self.path):
            if not pa.types.is_dictionary(array.type):
                array = array.dictionary_encode()
            known = array.dictionary.to_pylist()
            which = array.indices.to_numpy(zero_copy_only=False)
        if max(map(len, known), default=0) > LONGEST_TEXT:
            raise UserError(
                f"{self.path} has a text of more than {LONGEST_TEXT} characters in {name!r}."
            )
        return [known[number] for number in which]

    def index_name(self) -> str | None:
        """Column that pandas takes for the index; None if it is not one of the file's."""
        metadata = (self._schema.metadata or {}).get(b"pandas", b"{}")
        try:
            (found,) = json.loads(metadata)["index_columns"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if isinstance(found, str) and found in self.columns else None

    def is_text(self, name: str) -> bool:
        """Whether the column holds texts."""
        return name in self.columns and _is_text(self._schema.field(name).type)

    def images(self, name: str, rows: np.ndarray, place: Place) -> Iterator[bytes]:
        """The files of images that are held by the column at these rows, in order.

        Raises:
            UserError: a row holds no image, or refers to a file or an address instead.
        """
        first = 0
        for group in range(self._file.metadata.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            some = rows[(rows >= first) & (rows < first + count)]
            if some.size:
                column = self._images_of(name, group)
                for row in some:
                    yield self._image(name, column[int(row) - first].as_py(), int(row), place)
            first += count

    def _images_of(self, name: str, group: int) -> Any:
        """A row group's, of which the last one is kept: it may hold many episodes."""
        if self._held.get(name, (None,))[0] != group:
            self._held[name] = (group, self._read(name, encoded=True, group=group))
        return self._held[name][1]

    def _image(self, name: str, value: Any, row: int, place: Place) -> bytes:
        value = {"bytes": value} if isinstance(value, bytes) else value
        held = value.get("bytes") if isinstance(value, dict) else None
        if isinstance(held, bytes):
            return held
        elsewhere = value.get("path") if isinstance(value, dict) else value
        if isinstance(elsewhere, str):
            raise UserError(
                f"{self.path}: {place(row)} refers to {elsewhere[:200]!r} in {name!r} instead of "
                "holding the image; only images in the file itself are read."
            )
        raise UserError(f"{self.path}: {place(row)} holds no image in {name!r}.")

    def _read(self, name: str, *, encoded: bool = False, group: int | None = None) -> Any:
        """The column as one array. `encoded` keeps equal bytes once, however often they occur."""
        import pyarrow as pa
        import pyarrow.parquet

        leaves = self._leaves_of(name)
        with _one_sentence(self.path):
            file = self._file
            if encoded:
                kept = [path for path, kind in leaves if _is_text(kind) or _is_bytes(kind)]
                file = pyarrow.parquet.ParquetFile(self.path, read_dictionary=kept)
            paths = [path for path, _ in leaves]
            if group is None:
                table = file.read(columns=paths, use_threads=False)
            else:
                table = file.read_row_group(group, columns=paths, use_threads=False)
            column = table.column(name).unify_dictionaries().combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
            column.validate(full=True)  # a damaged file's may point out of its own memory
        rows = self.num_rows if group is None else self._file.metadata.row_group(group).num_rows
        if len(column) != rows:
            raise UserError(f"{self.path} is damaged: {len(column)} of {rows} rows have {name!r}.")
        return column

    def _leaves_of(self, name: str) -> list[tuple[str, Any]]:
        if self.columns.count(name) != 1:
            raise UserError(
                f"{self.path} has no column {name!r}; it has {plain(', '.join(self.columns))}."
                if name not in self.columns
                else f"{self.path} has the column {name!r} twice."
            )
        return self._leaves[name]

    def _declared(self) -> tuple[int, int]:
        """Rows, and bytes of what they unpack to.

        Pyarrow's own table of the single columns is not touched: of some damaged files it ends the
        process.
        """
        metadata = self._file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return int(metadata.num_rows), sum(int(group.total_byte_size) for group in groups)

    def _find_leaves(self) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
        """Column -> path in the file and type of each of the arrays that it is stored as."""
        number = 0
        for field in self._schema:
            kinds = list(_leaf_types(field.type))
            yield (
                field.name,
                [(self._file.schema.column(number + i).path, kind) for i, kind in enumerate(kinds)],
            )
            number += len(kinds)

    def _check_filled(self, name: str, array: Any, place: Place) -> None:
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(f"{self.path}: {place(row)} has nothing in {name!r}.")

    def _lengths(self, array: Any) -> np.ndarray:
        import pyarrow.compute

        with _one_sentence(self.path):
            return np.asarray(pyarrow.compute.list_value_length(array).to_numpy())


def read_tasks(path: Path) -> Tasks:
    """The texts of the tasks, wherever the file keeps them: in the index or in a column.

    Raises:
        UserError: the file cannot be read, has no texts, or gives one number two of them.
    """
    table = ParquetTable(path)
    name = _text_column(table)

    def place(row: int) -> str:
        return f"row {row}"

    numbers, texts = table.whole_numbers("task_index", place), table.texts(name, place)
    found: dict[int, str] = {}
    for number, text in zip(numbers.tolist(), texts, strict=True):
        if found.setdefault(number, text) != text:
            raise UserError(f"{path} gives the task_index {number} two texts.")
    return Tasks(path, found)


def _text_column(table: ParquetTable) -> str:
    """LeRobot keeps the text in the index; who writes the file with other tools, in a column."""
    for name in ("task", table.index_name(), "__index_level_0__"):
        if name is not None and table.is_text(name):
            return name
    texts = [name for name in table.columns if table.is_text(name)]
    if len(texts) == 1:
        return texts[0]
    raise UserError(
        f"{table.path} has no texts of tasks: they belong in its index or in a column 'task'; it "
        f"has {plain(', '.join(table.columns))}."
    )


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Makes one sentence of what pyarrow raises."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = plain((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(
            f"{path} cannot be read ({reason}); is it whole, and was its recording finalized?"
        ) from error


def _leaf_types(kind: Any) -> Iterator[Any]:
    """The types of what a nested type is stored as."""
    import pyarrow as pa

    if isinstance(kind, pa.ExtensionType):
        yield from _leaf_types(kind.storage_type)
    elif pa.types.is_dictionary(kind):
        yield kind.value_type
    elif pa.types.is_nested(kind):
        for number in range(kind.num_fields):
            yield from _leaf_types(kind.field(number).type)
    else:
        yield kind


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

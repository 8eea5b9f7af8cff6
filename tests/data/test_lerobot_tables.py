"""Tasks of a LeRobotDataset, wherever who wrote it kept their texts."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_trqam.data.sources.lerobot.tables import ParquetTable, read_tasks
from vla_trqam.errors import UserError

TEXTS = {0: "reach", 1: "lift", 2: "put"}


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"task_index": list(TEXTS)}, index=pd.Index(TEXTS.values(), name="task")),
        pd.DataFrame({"task_index": list(TEXTS)}, index=list(TEXTS.values())),
        pd.DataFrame({"task_index": list(TEXTS)}, index=pd.Index(TEXTS.values(), name="words")),
        pd.DataFrame({"task_index": list(TEXTS), "task": TEXTS.values()}),
        pd.DataFrame({"task_index": list(TEXTS), "instruction": TEXTS.values()}),
        pd.DataFrame({"task": TEXTS.values(), "task_index": list(TEXTS)}).iloc[::-1],
        pd.DataFrame(
            {"task_index": [2, 0, 1]}, index=pd.Index(["put", "reach", "lift"], name="task")
        ),
    ],
    ids=["index", "unnamed", "other index", "column", "other column", "backwards", "out of order"],
)
def test_texts_are_found_by_their_number(tmp_path: Path, frame: pd.DataFrame) -> None:
    frame.to_parquet(tmp_path / "tasks.parquet")
    assert read_tasks(tmp_path / "tasks.parquet").texts == TEXTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task_index": [0, 1]}, "has no texts of tasks: they belong in its index or in a column"),
        ({"task": ["reach"]}, "has no column 'task_index'"),
        ({"task_index": [0, 0], "task": ["a", "b"]}, "gives the task_index 0 two texts"),
        ({"task_index": [0, 1], "task": ["a", None]}, "row 1 has nothing in 'task'"),
        ({"task_index": ["0"], "task": ["a"]}, "has string in 'task_index', which must be of num"),
        ({"task_index": [0.5], "task": ["a"]}, "has float64 in 'task_index', not whole numbers"),
        ({"task_index": [0], "task": ["a" * 10_001]}, "text of more than 10000 characters"),
    ],
)
def test_tables_without_texts_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "tasks.parquet")
    with pytest.raises(UserError, match=message):
        read_tasks(tmp_path / "tasks.parquet")


def test_a_column_is_read_without_others_whose_names_begin_alike(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    table = pa.table({"action": lists, "action.more": ["a", "b"], "a.action": [5, 6]})
    pq.write_table(table, tmp_path / "x.parquet")
    found = ParquetTable(tmp_path / "x.parquet").numbers("action", 2, str)
    assert found.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", [pa.float64(), pa.int32(), pa.bool_(), pa.list_(pa.float32(), 1)])
def test_single_numbers_may_be_lists_of_one(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.array([[1.0], [0.0]], pa.list_(pa.float32(), 1))
    values = lists if pa.types.is_fixed_size_list(kind) else pa.array([1, 0]).cast(kind)
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet")
    assert ParquetTable(tmp_path / "x.parquet").numbers("x", 1, str).tolist() == [[1], [0]]

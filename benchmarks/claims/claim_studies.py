"""Studies as the claims read them: the table of runs, and copies of what a reader wants."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import above  # noqa: F401 (benchmarks/)

from vla_trqam.errors import UserError

TABLE, COMMANDS = "table.csv", "commands.json"
KEPT = ("table.md", TABLE, "summary.json", COMMANDS)


def read_table(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """One mapping a run, by column.

    Raises:
        UserError: there is no table, or it lacks one of these columns.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{path} is not there; a finished study has one")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := [name for name in columns if not rows or name not in rows[0]]:
        raise UserError(f"{path} has no column {missing[0]}: it is of another kind of study")
    return rows


def keep(folder: Path, to: Path) -> Path:
    """Copies what a reader wants of a study into a folder by its tasks' names; returns where."""
    tasks = list(dict.fromkeys(row["task"] for row in read_table(folder, ["task"])))
    own = to / "_".join(tasks)
    own.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, own / name)
    shutil.copytree(folder / "pictures", own / "pictures", dirs_exist_ok=True)
    return own

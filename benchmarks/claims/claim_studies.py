"""Studies as the claims read them: the table of runs, and copies for a reader."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from claim_page import Source

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


def from_studies[T](read: Callable[[Sequence[Path]], Sequence[T]]) -> Source[T]:
    """A claim's studies, of which a reader keeps the tables and pictures.

    Args:
        read: what the studies' folders are to the claim.
    """

    def copied(folders: Sequence[Path], to: Path) -> str:
        return "\n".join(f"kept {keep(folder, to)}" for folder in folders)

    return Source(
        "--studies",
        "their folders",
        read,
        "--keep",
        "folder for copies of what a reader wants",
        copied,
    )

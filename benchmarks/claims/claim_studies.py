"""Studies as the claims read them: the table of runs, copies for a reader, the command line."""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
from marked import put

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


def write_claim[T](
    name: str,
    about: str,
    arguments: Sequence[str] | None,
    read: Callable[[Sequence[Path]], Sequence[T]],
    tell: Callable[[Sequence[T]], str],
    draw: Callable[[Path, Sequence[T]], Path] | None = None,
) -> int:
    """Command line of a claim that is read from studies.

    Args:
        name: of the claim, between whose markers its numbers stand.
        about: a sentence.
        arguments: the command line; None for the program's.
        read: what the studies' folders are to the claim.
        tell: its verdict and table.
        draw: its picture; None where the studies' own are enough.

    Returns:
        The exit status; 2 for what is no study of the claim's.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--studies", type=Path, nargs="+", required=True, help="their folders")
    parser.add_argument("--keep", type=Path, help="folder for copies of what a reader wants")
    parser.add_argument("--page", type=Path, help="Markdown page to write the numbers into")
    if draw is not None:
        parser.add_argument("--output", type=Path, help="PNG to draw")
    given = parser.parse_args(arguments)
    try:
        found = read(given.studies)
        text = tell(found)
        if given.page is not None:
            put(given.page, name, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if draw is not None and given.output is not None:
        print(f"\nwrote {draw(given.output, found)}")
    if given.keep is not None:
        for folder in given.studies:
            print(f"kept {keep(folder, given.keep)}")
    return 0

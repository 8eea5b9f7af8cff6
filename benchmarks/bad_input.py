"""Does every piece of malformed input get one sentence?

    python benchmarks/bad_input.py
    python benchmarks/bad_input.py --area=hdf5

Each row spoils a copy of sound input in one place and gives it to a recipe, which must end with
status 2 and one line ``error: ...`` that names what is wrong, before a simulator starts, and leave
every folder as it was. Prints a Markdown table, and exits with 1 where a row gets something else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bad_inputs.dataset import ROWS as DATASET_ROWS
from bad_inputs.folder import ROWS as FOLDER_ROWS
from bad_inputs.hdf5 import ROWS as HDF5_ROWS
from bad_inputs.hub import ROWS as HUB_ROWS
from bad_inputs.ogbench import ROWS as OGBENCH_ROWS
from bad_inputs.place import DATASET, POLICY, Originals, Place, Row, run_main
from bad_inputs.policy import ROWS as POLICY_ROWS
from bad_inputs.settings import ROWS as SETTINGS_ROWS
from bad_inputs.study import ROWS as STUDY_ROWS

ROWS = (
    *(*SETTINGS_ROWS, *HDF5_ROWS, *DATASET_ROWS, *POLICY_ROWS, *FOLDER_ROWS, *HUB_ROWS),
    *(*OGBENCH_ROWS, *STUDY_ROWS),
)
REPOSITORY = Path(__file__).resolve().parents[1]
ERROR = "error: "


@dataclass(frozen=True)
class Answer:
    """What a recipe made of a row.

    Attributes:
        sentence: without the folders of this machine; empty where there was none.
        problems: what is wrong with the answer.
    """

    sentence: str
    problems: tuple[str, ...]


def answer(row: Row, originals: Originals) -> Answer:
    """Runs a row."""
    with TemporaryDirectory() as folder:
        place = Place(Path(folder), originals)
        command = row.spoil(place)
        before, said, printed = contents(place.root), io.StringIO(), io.StringIO()
        status: object
        with (
            contextlib.chdir(place.root),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed),
        ):
            try:
                status = run_main(command)
            except (Exception, SystemExit) as error:  # what a user would see as a traceback
                status = f"{type(error).__name__}: {error}"
        lines = [line for line in said.getvalue().splitlines() if line.startswith(ERROR)]
        sentence = shown(lines[0].removeprefix(ERROR), place) if lines else ""
        problems = [
            *_wrong_ending(status, lines, said.getvalue()),
            *(f"{w!r} is not in it" for w in row.words if w.lower() not in sentence.lower()),
            *_changes(before, contents(place.root)),
        ]
    return Answer(sentence, tuple(problems))


def _wrong_ending(status: object, lines: Sequence[str], said: str) -> Iterator[str]:
    if status != 2:
        yield f"ended with {' '.join(str(status).split())[:300]}"
    if len(lines) != 1:
        yield f"{len(lines)} lines begin with {ERROR!r}"
    if "Traceback" in said:
        yield "a traceback"


def contents(root: Path) -> dict[str, str]:
    """Every path below a folder, and what is there."""

    def what(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        if not path.is_file():
            return "folder"
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()

    return {str(path.relative_to(root)): what(path) for path in sorted(root.rglob("*"))}


def _changes(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    changed = {path for path in before.keys() & after.keys() if before[path] != after[path]}
    for paths, what in (
        (after.keys() - before.keys(), "left behind"),
        (before.keys() - after.keys(), "gone"),
        (changed, "changed"),
    ):
        if paths:
            yield f"{what}: {', '.join(sorted(paths)[:3])} ({len(paths)} in all)"


def shown(sentence: str, place: Place) -> str:
    """The sentence with names in place of this machine's folders."""
    names = {str(path): f"<{path.name}>" for path in place.root.glob("*")}
    names |= {str(place / name): f"<{name}>" for name in ("run", "policy", "dataset")}
    names |= {str(POLICY): "<packed policy>", str(DATASET): "<packed dataset>"}
    names |= {str(place.originals.hdf5): "<demos>", str(place.root): "<folder>"}
    names |= {str(place.originals.root): "<originals>", str(REPOSITORY): "<repository>"}
    for path in sorted(names, key=len, reverse=True):
        sentence = sentence.replace(path, names[path])
    return sentence


def table(rows: Sequence[Row], answers: Sequence[Answer]) -> str:
    """Markdown: a line a row."""
    lines = ["| area | what is wrong | the sentence |", "|---|---|---|"]
    for row, got in zip(rows, answers, strict=True):
        wrong = f" **{'; '.join(got.problems)}**" if got.problems else ""
        cells = (row.area, row.wrong, f"{got.sentence}{wrong}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    areas = sorted({row.area for row in ROWS})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--area", choices=areas, help="of the rows to run; all unless given")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if options.area in (None, row.area)]
    with TemporaryDirectory() as folder:
        originals = Originals(Path(folder))
        with contextlib.redirect_stdout(sys.stderr):
            answers = [answer(row, originals) for row in rows]
    right = sum(not got.problems for got in answers)
    print(f"{table(rows, answers)}\n\n{right} of {len(rows)} rows get one sentence")
    return int(right != len(rows))


if __name__ == "__main__":
    sys.exit(main())

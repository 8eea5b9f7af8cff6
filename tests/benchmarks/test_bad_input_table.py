"""Every row of the table of malformed input gets one sentence."""

from pathlib import Path

import bad_input
import pytest
from bad_input import ROWS, Answer, answer, table
from bad_inputs.place import Command, Originals, Place, Row, robomimic

LIGHT = {"settings", "file of settings", "hdf5", "resume", "run", "MLP policy"}
"""Areas whose recipes do without LeRobot, whose import alone takes seconds."""


def marked(row: Row) -> object:
    marks = [] if row.area in LIGHT else [pytest.mark.slow]
    return pytest.param(row, id=row.name, marks=marks)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_malformed_input_gets_one_sentence(row: Row, originals: Originals) -> None:
    got = answer(row, originals)
    assert got.problems == (), got.sentence


def test_there_are_many_rows_and_none_twice() -> None:
    assert len(ROWS) >= 150
    assert len({row.name for row in ROWS}) == len(ROWS)


def _sound(place: Place) -> Command:
    return robomimic(place)


def _unreadable(place: Place) -> Command:
    return robomimic(place, "--seed=-1")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (Row("x", "nothing is wrong", _sound, ()), "a simulator was started"),
        (Row("x", "another sentence", _unreadable, ("chunk",)), "'chunk' is not in it"),
    ],
)
def test_a_row_that_gets_something_else_is_told(
    row: Row, problem: str, originals: Originals
) -> None:
    got = answer(row, originals)
    assert any(problem in each for each in got.problems)
    assert f"**{got.problems[0]}" in table([row], [got])


def test_a_folder_that_is_left_behind_is_told(
    originals: Originals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves_a_folder(_: Command) -> int:
        Path("run").mkdir()
        return 2

    monkeypatch.setattr(bad_input, "run_main", leaves_a_folder)
    got = answer(Row("x", "nothing is wrong", _sound, ()), originals)
    assert any(each.startswith("left behind: run") for each in got.problems)


def test_the_table_has_a_line_a_row_without_paths_of_this_machine(originals: Originals) -> None:
    row = next(row for row in ROWS if row.wrong == "half a file")
    got = answer(row, originals)
    assert "<file.hdf5>" in got.sentence
    assert str(Path.cwd()) not in got.sentence
    head, _, line = table([row], [Answer("one | two", ())]).splitlines()
    assert head == "| area | what is wrong | the sentence |"
    assert line == "| hdf5 | half a file | one \\| two |"

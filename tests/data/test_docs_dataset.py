"""The source of docs/add_a_dataset.md is one: what stands there is run."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from docs_pages import code_of

from vla_trqam.errors import UserError

FILE, TESTS, BATCHES = code_of("add_a_dataset.md")
page = ModuleType("npz_source_of_the_docs")
sys.modules[page.__name__] = page  # dataclasses look there
exec(FILE, vars(page))
exec(TESTS, suite := {**vars(page), "__name__": __name__})
exec(BATCHES, batches := dict(vars(page)))
TestNpzFolder = suite["TestNpzFolder"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "episodes"
    folder.mkdir()
    suite["write"](folder, 0, 5, True)
    suite["write"](folder, 1, 6, False)
    return folder


def test_the_page_fills_a_replay_and_draws_from_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches["batches"](folder, tmp_path / "replay")
    assert capsys.readouterr().out == (
        "demonstrations: 2 episodes of 11 steps, 1 of them successes; an episode that is none "
        "counts as cut by a limit\n"
        "(64, 2, 2) a chunk is worth 1.0 at most\n"
    )


def no_zip(file: Path) -> None:
    file.write_text("no zip")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def pickled(file: Path) -> None:
    np.savez(file, observations=np.array([{}, {}]), actions=np.zeros((1, 2)), success=True)


def saved(**columns: np.ndarray):
    def spoil(file: Path) -> None:
        whole = {"observations": np.zeros((3, 3)), "actions": np.zeros((2, 2)), "success": True}
        np.savez(file, **whole | columns)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_zip, "{file} is no episode: "),
        (cut_short, "{file} is no episode: File is not a zip file"),
        (pickled, "{file} is no episode: Object arrays cannot be loaded"),
        (saved(success=np.zeros(2)), "{file} is no episode: The truth value"),
        (
            saved(actions=np.zeros((3, 2))),
            "{file} has observations of (3, 3) and actions of (3, 2)",
        ),
        (saved(actions=np.full((2, 2), np.nan)), "{file} has no step, or numbers that are not"),
        (
            saved(observations=np.zeros((3, 4))),
            "{file} has observations and actions of (4, 2), not",
        ),
    ],
)
def test_a_file_that_is_no_episode_is_refused_by_its_name(folder, spoil, sentence) -> None:
    file = folder / "001.npz"
    spoil(file)
    with pytest.raises(UserError, match="^" + re.escape(sentence.format(file=file))):
        page.open_npz(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \*\.npz; an episode is a file"):
        page.open_npz(tmp_path)

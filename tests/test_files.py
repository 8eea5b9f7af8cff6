from pathlib import Path

import pytest

from vla_trqam.files import written_whole


def write_file(path: Path, text: str) -> None:
    path.write_text(text)


def write_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / text).write_text(text)


def write_link(path: Path, text: str) -> None:
    path.symlink_to(text)


def content(path: Path) -> str:
    if path.is_symlink():
        return str(path.readlink())
    return path.read_text() if path.is_file() else ",".join(p.name for p in path.iterdir())


WRITERS = [write_file, write_folder, write_link]


@pytest.mark.parametrize("write", WRITERS)
def test_the_new_takes_the_olds_name(write, tmp_path):
    path = tmp_path / "it.json"
    for text in ("old", "new"):
        with written_whole(path) as part:
            assert part.suffix == path.suffix
            write(part, text)
        assert content(path) == text
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there_and_nothing_else(error, write, tmp_path):
    path = tmp_path / "it"
    write(path, "old")

    def fail():
        with written_whole(path) as part:
            write(part, "new")
            raise error

    with pytest.raises(error):
        fail()
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("left", WRITERS)
@pytest.mark.parametrize("write", WRITERS)
def test_what_a_kill_left_is_not_in_the_way(write, left, tmp_path):
    path = tmp_path / "it"
    with written_whole(path) as part:
        write(part, "old")
    left(part, "half")
    with written_whole(path) as part:
        write(part, "new")
    assert content(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_is_replaced_and_its_folder_is_kept(tmp_path):
    write_folder(tmp_path / "old", "kept")
    link = tmp_path / "last"
    link.symlink_to("old")
    with written_whole(link) as part:
        part.symlink_to("new")
    assert content(link) == "new"
    assert content(tmp_path / "old") == "kept"

"""What a run is trained on, kept with it."""

import json
import os

import pytest

from vla_trqam.data.sources.lerobot.hub import commit_of
from vla_trqam.engine.folder import pins
from vla_trqam.engine.folder.pins import Input, check_pins, read_pins, write_pins
from vla_trqam.errors import UserError


@pytest.fixture
def run(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    (data / "meta").mkdir(parents=True)
    (data / "meta" / "info.json").write_text("{}")
    (data / "a.parquet").write_text("numbers")
    (data / "README.md").write_text("card")
    write_pins(run, [Input("dataset", "me/it", data, ("meta/info.json", "a.parquet"))])
    return run


@pytest.fixture
def read(monkeypatch):
    """The files whose bytes were looked at."""
    names = []
    of = pins.FileFacts.of

    def noting(path):
        names.append(path.name)
        return of(path)

    monkeypatch.setattr(pins.FileFacts, "of", noting)
    return names


def test_what_is_as_it_was_is_not_read_again(run, read):
    check_pins(run)
    assert read == []


def test_only_what_has_another_time_is_read_and_the_same_bytes_are_the_same(run, read):
    os.utime(run.with_name("data") / "a.parquet", ns=(1, 1))
    check_pins(run)
    assert read == ["a.parquet"]


@pytest.mark.parametrize("text", ["letters", "numbers!"])
def test_other_bytes_are_refused_and_named(text, run):
    path = run.with_name("data") / "a.parquet"
    path.write_text(text)
    with pytest.raises(UserError, match="is not the one that the run in") as refused:
        check_pins(run)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named_and_one_that_does_not_matter_is_not_looked_at(run):
    data = run.with_name("data")
    (data / "README.md").write_text("another card")
    check_pins(run)
    (data / "meta" / "info.json").unlink()
    with pytest.raises(UserError, match=r"meta/info\.json \(dataset\) is missing"):
        check_pins(run)


def test_a_commit_of_the_hub_needs_no_folder(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "cache" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert commit_of(folder) == commit
    assert commit_of(tmp_path / "cache") is None
    assert commit_of(tmp_path / "snapshots" / "main") is None
    write_pins(tmp_path, [Input("policy", "me/it", folder, ("config.json",), commit_of(folder))])
    assert read_pins(tmp_path)["policy"].commit == commit
    (folder / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config\.json \(policy\)"):
        check_pins(tmp_path)
    (folder / "config.json").unlink()
    folder.rmdir()
    check_pins(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"policy": {}}', '{"policy": {"files": {"a": {}}}}'])
def test_a_damaged_file_of_pins_is_refused(text, run):
    (run / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json does not say"):
        check_pins(run)


def test_the_file_says_what_it_pins(run):
    (pin,) = json.loads((run / "inputs.json").read_text()).values()
    assert pin["asked"] == "me/it"
    assert sorted(pin["files"]) == ["a.parquet", "meta/info.json"]
    assert pin["files"]["a.parquet"]["size"] == 7

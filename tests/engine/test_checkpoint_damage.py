"""A checkpoint that is not what was written is not gone on with."""

import json
import os

import pytest
import torch
from test_checkpoints import POSITION, save, trained
from toy_learners import make_off_policy

from vla_trqam.engine.folder import manifest
from vla_trqam.engine.folder.checkpoints import (
    Position,
    check_whole,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    take_checkpoint,
)
from vla_trqam.engine.folder.manifest import MANIFEST_NAME, FileFacts, damage
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.errors import UserError
from vla_trqam.files import written_durably

NAMES = ("000003", "000006", "000009")


@pytest.fixture
def run(tmp_path):
    """A run's folder with three checkpoints."""
    for number, name in enumerate(NAMES, 1):
        position = Position("offline", 3 * number, 3 * number, [5], 7, {"offline": number}, "no")
        save(tmp_path, name, position=position)
    return tmp_path


def weights(run, name):
    return run / "checkpoints" / name / "algorithm" / "networks.safetensors"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def load(checkpoint):
    check_whole(checkpoint)
    load_checkpoint(checkpoint, make_off_policy(), Generators.seeded(0, torch.device("cpu")))


def test_the_manifest_has_every_file_and_its_checksum(run):
    checkpoint = run / "checkpoints" / "000003"
    files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert set(files) == there - {MANIFEST_NAME}
    empty = checkpoint / "empty"
    empty.touch()
    # RFC 7693's function with 32 bytes, by coreutils: b2sum -l 256 /dev/null
    known = "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"
    assert FileFacts.of(empty) == FileFacts(0, known)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "networks.safetensors is damaged: its checksum"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "networks.safetensors has "),
        (lambda p: p.unlink(), "networks.safetensors is missing"),
    ],
)
def test_a_damaged_file_is_named_with_the_newest_good_checkpoint_and_its_flag(spoil, words, run):
    spoil(weights(run, "000009"))
    spoil(weights(run, "000006"))
    last = last_checkpoint(run)
    for look in (check_whole, load):
        with pytest.raises(UserError, match=words) as refused:
            look(last)
        assert "--resume=true --checkpoint=000003 goes on from it" in str(refused.value)
        assert str(last / "algorithm") in str(refused.value)
    load(run / "checkpoints" / "000003")


def test_without_another_good_checkpoint_that_is_said(run):
    for name in NAMES:
        flip(weights(run, name))
    with pytest.raises(UserError, match="no other checkpoint of the run is whole"):
        load(last_checkpoint(run))


def test_a_damaged_manifest_is_damage_and_a_missing_one_is_an_old_checkpoint(run):
    path = run / "checkpoints" / "000009" / MANIFEST_NAME
    path.write_text('{"files": {"a": {}}}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load(last_checkpoint(run))
    path.unlink()
    flip_nothing = damage(path.parent)
    assert flip_nothing is None
    load(last_checkpoint(run))


def test_a_checkpoint_that_is_taken_becomes_the_last_and_tells_what_came_after(run):
    flip(weights(run, "000009"))
    later = take_checkpoint(run, "000003")
    assert [path.name for path in later] == ["000006", "000009"]
    assert last_checkpoint(run).name == "000003"


def test_only_a_whole_checkpoint_that_is_there_is_taken(run):
    with pytest.raises(UserError, match="there are 000003, 000006, 000009"):
        take_checkpoint(run, "000004")
    with pytest.raises(UserError, match="there are"):
        take_checkpoint(run, "last")
    flip(weights(run, "000006"))
    with pytest.raises(UserError, match="--checkpoint=000009"):
        take_checkpoint(run, "000006")
    assert last_checkpoint(run).name == "000009"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        events.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_name(old, new):
        events.append(("name", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    learner = trained()
    generators = Generators.seeded(0, torch.device("cpu"))
    save_policy = learner.policy.save_pretrained
    final = save_checkpoint(tmp_path, "000003", learner, save_policy, generators, POSITION)
    part = final.with_name(".part.000003")
    named = events.index(("name", str(final)))
    before = {path for kind, path in events[:named] if kind == "sync"}
    written = [final, *final.rglob("*")]
    assert len(written) == 13
    assert before == {str(part / path.relative_to(final)) for path in written}
    pointed = events.index(("name", str(final.with_name("last"))))
    assert ("sync", str(final.parent)) in events[named:pointed]
    assert events[-1] == ("sync", str(final.parent))


def test_a_kill_while_a_checkpoint_is_replaced_leaves_no_half_of_it(run, monkeypatch):
    def dies(path):
        next(path.rglob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_trqam.files.shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        save(run, "000009")
    monkeypatch.undo()
    found = last_checkpoint(run)
    assert found.name == "000006"
    load(found)
    assert last_checkpoint(run) == found


def test_what_is_written_durably_is_replaced_durably(tmp_path):
    for text in ("old", "new"):
        with written_durably(tmp_path / "it") as part:
            part.mkdir()
            (part / "content").write_text(text)
    assert (tmp_path / "it" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_the_digest_is_of_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "it"
    path.write_bytes(b"a" * 2_000_000)
    one = manifest.FileFacts.of(path)
    path.write_bytes(b"a" * 1_999_999 + b"b")
    assert manifest.FileFacts.of(path) != one

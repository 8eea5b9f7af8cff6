import json

import numpy as np
import pytest
import torch
from toy_learners import make_batch, make_off_policy

from vla_trqam.engine.folder import checkpoints
from vla_trqam.engine.folder.checkpoints import (
    Position,
    last_checkpoint,
    load_checkpoint,
    read_position,
    save_checkpoint,
)
from vla_trqam.engine.folder.state import module_tensors
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.errors import UserError

POSITION = Position("offline", 3, 3, [5], 7, {"offline": 0.1}, "no")


def save(folder, name="000003", learner=None, position=POSITION):
    learner = learner or trained()
    generators = Generators.seeded(0, torch.device("cpu"))
    policy = learner.policy
    return save_checkpoint(folder, name, learner, policy.save_pretrained, generators, position)


def trained(seed=0):
    learner = make_off_policy(seed)
    learner.update(make_batch(0), torch.Generator().manual_seed(0))
    return learner


def test_a_checkpoint_has_the_layout_that_is_promised(tmp_path):
    path = save(tmp_path)
    assert path == tmp_path / "checkpoints" / "000003"
    folders = {"pretrained_model", "training_state", "algorithm"}
    assert {p.name for p in path.iterdir()} == folders | {"manifest.json"}
    assert last_checkpoint(tmp_path) == path.resolve()
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_everything_comes_back(tmp_path):
    learner, generators = trained(), Generators.seeded(3, torch.device("cpu"))
    generators.replay.random(11)
    torch.randn(5, generator=generators.noise)
    path = save_checkpoint(
        tmp_path, "000003", learner, learner.policy.save_pretrained, generators, POSITION
    )
    fresh, others = make_off_policy(seed=9), Generators.seeded(8, torch.device("cpu"))
    load_checkpoint(path, fresh, others)
    assert read_position(path) == POSITION
    assert fresh.scalars() == learner.scalars()
    expected = module_tensors(learner)
    assert all(torch.equal(v, expected[k]) for k, v in module_tensors(fresh).items())
    assert np.array_equal(others.replay.random(4), generators.replay.random(4))
    noise = [torch.randn(4, generator=g.noise) for g in (others, generators)]
    assert torch.equal(*noise)


@pytest.mark.parametrize("step", ["save_file", "_write_json", "_point"])
@pytest.mark.parametrize("number", range(4))
def test_a_kill_while_saving_leaves_the_checkpoint_before(step, number, tmp_path, monkeypatch):
    before = save(tmp_path)
    content = {p: p.read_bytes() for p in before.rglob("*") if p.is_file()}
    function, count = getattr(checkpoints, step), 0

    def dying(*arguments):
        nonlocal count
        count += 1
        if count == number + 1:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(checkpoints, step, dying)
    try:
        save(tmp_path, "000004")
    except KeyboardInterrupt:
        assert last_checkpoint(tmp_path) == before.resolve()
    else:
        assert number >= {"save_file": 3, "_write_json": 3, "_point": 1}[step]
    assert {p: p.read_bytes() for p in before.rglob("*") if p.is_file()} == content
    monkeypatch.undo()
    # What the kill left behind is not in the way of the next attempt.
    after = save(tmp_path, "000004")
    assert last_checkpoint(tmp_path) == after.resolve() != before.resolve()


def test_a_half_written_checkpoint_is_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / ".part.000003" / "algorithm").mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None


def test_without_the_link_the_newest_checkpoint_is_the_one_farthest_on(tmp_path):
    pretrained = Position("pretrain", 900, 0, [5], 7, {}, "no")
    for name, position in [("pretrain_000900", pretrained), ("000003", POSITION)]:
        save(tmp_path, name, position=position)
    (tmp_path / "checkpoints" / "last").unlink()
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "000003"


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    path = save(tmp_path)
    other = make_off_policy(train_base=True)
    with pytest.raises(UserError, match=r"does not fit this run.*behaviour"):
        load_checkpoint(path, other, Generators.seeded(0, torch.device("cpu")))


def test_a_position_that_says_nothing_is_refused(tmp_path):
    path = save(tmp_path) / "training_state" / "position.json"
    path.write_text(json.dumps({"phase": "offline"}))
    with pytest.raises(UserError, match=r"position\.json does not say"):
        read_position(path.parents[1])

import json

import pytest

from vla_trqam.envs.env_meta import check_env_meta, env_meta_for
from vla_trqam.errors import UserError


@pytest.mark.parametrize("task", ["Lift", "PickPlaceCan", "NutAssemblySquare"])
def test_env_meta_survives_json_and_passes_its_own_check(task):
    env_meta = env_meta_for(task)
    assert json.loads(json.dumps(env_meta)) == env_meta
    check_env_meta(env_meta)


def test_env_meta_is_a_fresh_copy_every_time():
    env_meta_for("Lift")["env_kwargs"]["robots"].append("Sawyer")
    assert env_meta_for("Lift")["env_kwargs"]["robots"] == ["Panda"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_version": "1.4.1"}, "robosuite 1.4.1.*v1.5 file"),
        ({"env_version": "1.50.0"}, "robosuite 1.50.0"),
        ({"type": 2}, "type 2"),
        ({"env_kwargs": {"robots": object()}}, "JSON"),
    ],
)
def test_env_meta_that_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_env_meta(env_meta_for("Lift") | change)


def test_missing_keys_are_named():
    with pytest.raises(UserError, match="lack env_version, type"):
        check_env_meta({"env_name": "Lift", "env_kwargs": {}})


def test_unknown_task_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"'Can' is unknown.*PickPlaceCan"):
        env_meta_for("Can")

"""`--env.type` is a choice, and a setting of another simulator is refused."""

import re

import pytest

from vla_trqam.envs.registry import EnvConfig, make_family
from vla_trqam.envs.robomimic.env_meta import LOW_DIM_KEYS
from vla_trqam.errors import UserError


def test_robomimic_takes_its_cameras_and_lift_where_no_task_is_named():
    config = EnvConfig("robomimic", cameras=("frontview",), image_size=32, shadows=False)
    family = make_family(config, max_episode_steps=70)
    assert (family.name, family.task, family.max_episode_steps) == ("robomimic", "Lift", 70)
    assert family.cameras == {"frontview": (32, 32, 3)}
    assert family.state_size == 9 != len(LOW_DIM_KEYS)


def test_ogbench_is_one_of_the_choices():
    pytest.importorskip("ogbench", reason="uv sync --extra ogbench")
    name = "pointmaze-medium-navigate-singletask-task3-v0"
    family = make_family(EnvConfig("ogbench", task=name), max_episode_steps=70)
    assert (family.name, family.task, family.max_episode_steps) == ("ogbench", name, 70)


REFUSED = {
    "another task of Robomimic": (
        EnvConfig("robomimic", task="Stack"),
        "--env.task=Stack must be one of Lift, PickPlaceCan, NutAssemblySquare",
    ),
    "Robomimic's camera elsewhere": (
        EnvConfig("ogbench", cameras=("top",)),
        "--env.cameras=('top',) is no setting of --env.type=ogbench; leave it out",
    ),
    "Robomimic's shadows elsewhere": (
        EnvConfig("pusht", shadows=False),
        "--env.shadows=False is no setting of --env.type=pusht; leave it out",
    ),
    "LeRobot's options elsewhere": (
        EnvConfig("robomimic", options={"fps": 3}),
        "--env.options={'fps': 3} is no setting of --env.type=robomimic",
    ),
    "no task of OGBench": (EnvConfig("ogbench"), "--env.task=None is none of OGBench's single"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_simulator_does_not_have_is_refused(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_family(config, max_episode_steps=5)

"""The task of docs/add_a_task.md is one: what stands there is run."""

from collections.abc import Iterator

import pytest
from docs_task import TESTS, registered

from vla_trqam.envs.registry import EnvConfig, make_family
from vla_trqam.errors import UserError

pytest.importorskip("pygame", reason="gymnasium draws with it: uv sync --extra pusht")
exec(TESTS, suite := {"__name__": __name__})
TestMountainCar = suite["TestMountainCar"]


@pytest.fixture(scope="module", autouse=True)
def _in_the_registry() -> Iterator[None]:
    with registered():
        yield


def test_the_settings_choose_it() -> None:
    family = make_family(EnvConfig("mountain_car"), max_episode_steps=7)
    assert (family.name, family.max_episode_steps) == ("mountain_car", 7)
    with pytest.raises(UserError, match="has one task; leave it out"):
        make_family(EnvConfig("mountain_car", task="Lift"), max_episode_steps=7)
    with pytest.raises(UserError, match=r"is no setting of --env\.type=mountain_car"):
        make_family(EnvConfig("mountain_car", image_size=48), max_episode_steps=7)

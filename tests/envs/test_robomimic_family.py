"""Robomimic's tasks as a family: of states, and with a camera."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import h5py
import numpy as np
import pytest
from family_contract import FamilyContract

import vla_trqam.data
from vla_trqam.envs.robomimic import env_meta
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.robomimic.images import STATE_KEYS, CameraSettings
from vla_trqam.errors import UserError

PACKED = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")


@pytest.mark.slow
class TestLift(FamilyContract):
    single_in_thread = True

    def make_family(self):
        return robomimic_family(env_meta_for("Lift"), max_episode_steps=35)

    def winner(self, env):
        """The quickest packed demonstration."""
        with h5py.File(PACKED) as stored:
            names = [name.decode() for name in stored["mask/better_successful"]]
            groups = [stored["data"][name] for name in names]
            quickest = min(groups, key=lambda group: len(group["actions"]))
            return int(quickest.attrs["seed"]), np.float32(quickest["actions"])


@pytest.mark.slow
class TestLiftWithACamera(FamilyContract):
    single_in_thread = True

    def make_family(self):
        return robomimic_family(
            env_meta_for("Lift"),
            max_episode_steps=10,
            obs_keys=STATE_KEYS,
            cameras=CameraSettings(("agentview",), image_size=24, shadows=False),
        )


def test_a_family_of_images_knows_its_sizes_before_anything_is_made():
    cameras = CameraSettings(("agentview", "robot0_eye_in_hand"), image_size=24)
    family = robomimic_family(
        env_meta_for("Lift"), max_episode_steps=10, obs_keys=STATE_KEYS, cameras=cameras
    )
    assert (family.state_size, family.action_size, family.control_rate) == (9, 7, 20)
    assert family.action_limits == (-1.0, 1.0)
    assert family.task_texts == ("lift the cube",)
    assert family.cameras == dict.fromkeys(cameras.names, (24, 24, 3))


@pytest.mark.parametrize(("found", "said"), [("1.4.0", "robosuite 1.4.0 is"), (None, "none is")])
def test_without_its_robosuite_the_command_that_installs_it_is_named(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(env_meta, "version", version)
    message = rf"need robosuite 1.5, and {said} installed: uv sync --extra robomimic"
    with pytest.raises(UserError, match=message):
        robomimic_family(env_meta_for("Lift"), max_episode_steps=5)


def test_a_limit_below_one_step_is_refused():
    with pytest.raises(UserError, match="max_episode_steps is 0; it must be at least 1"):
        robomimic_family(env_meta_for("Lift"), max_episode_steps=0)

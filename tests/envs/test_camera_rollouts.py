"""Images in the rollouts of a pool, and demonstrations given images."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import vla_trqam.data
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.robomimic.images import STATE_KEYS, CameraSettings, RobomimicImageEnv
from vla_trqam.envs.robomimic.render_demos import render_demos
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow

CAMERAS = CameraSettings(("agentview",), image_size=24, shadows=False)
HORIZON, LIMIT = 4, 10
PACKED = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")


def moves(seed, number):
    return np.random.default_rng((seed, number)).uniform(-1, 1, (HORIZON, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def env():
    made = RobomimicImageEnv(
        env_meta_for("Lift"),
        max_episode_steps=LIMIT,
        cameras=CAMERAS.names,
        image_size=CAMERAS.image_size,
        shadows=False,
        render_every=HORIZON,
    )
    yield made
    made.close()


def test_a_pools_policy_sees_what_the_environment_shows_at_its_decisions(env):
    seen = []

    def policy(observation, seeds, numbers):
        seen.append(observation)
        assert observation["task"] == ["lift the cube"]
        return moves(int(seeds[0]), int(numbers[0]))[None]

    family = robomimic_family(
        env_meta_for("Lift"), max_episode_steps=LIMIT, obs_keys=STATE_KEYS, cameras=CAMERAS
    )
    with RolloutPool(family, chunk_length=HORIZON, num_workers=1) as pool:
        (episode,) = pool.run(policy, [3])
    assert episode.task == "lift the cube"
    observation, _ = env.reset(seed=3)
    expected = [observation]
    for step in range(LIMIT):
        observation, *_, info = env.step(moves(3, step // HORIZON)[step % HORIZON])
        if info["frame_is_new"]:
            expected.append(observation)
    assert episode.images["agentview"].shape == (4, 24, 24, 3)  # steps 0, 4, 8 and the limit
    for image, shown in zip(episode.images["agentview"], expected, strict=True):
        assert np.array_equal(image, shown["pixels"]["agentview"])
    for asked, shown in zip(seen, expected[:-1], strict=True):
        assert np.array_equal(asked["agent_pos"][0], shown["agent_pos"])
        assert np.array_equal(asked["pixels"]["agentview"][0], shown["pixels"]["agentview"])


def test_shadows_change_the_picture_little(env):
    env.reset(seed=1)
    without = env._view.frame("agentview", 48).astype(int)
    view = type(env._view)(env.env, CameraSettings(("agentview",), 48, shadows=True))
    difference = np.abs(view.frame("agentview", 48) - without)
    assert 0 < difference.mean() < 2


@pytest.fixture
def two_demos(tmp_path):
    """A failure and a success of the packed file."""
    path = tmp_path / "two.hdf5"
    with h5py.File(PACKED) as source, h5py.File(path, "w") as copy:
        data = copy.create_group("data")
        data.attrs.update(source["data"].attrs)
        names = [
            min(
                (n.decode() for n in source["mask"][key]),
                key=lambda n: len(source["data"][n]["actions"]),
            )
            for key in ("failed", "better_successful")
        ]
        for name in names:
            source.copy(source["data"][name], data, name=name)
        data.attrs["total"] = sum(len(data[name]["actions"]) for name in names)
    return path


@pytest.mark.long
def test_demonstrations_are_repeated_as_recorded_and_seen_where_asked(two_demos):
    rendered = {demo.name: demo for demo in render_demos(two_demos, CAMERAS, every=5)}
    with h5py.File(two_demos) as stored:
        for name, demo in rendered.items():
            group, episode = stored["data"][name], demo.episode
            steps = len(episode.actions)
            position = group["obs/robot0_eef_pos"][:steps]
            assert np.abs(episode.observations[:-1, :3] - position).max() < 1e-3
            expected = [s for s in range(steps + 1) if s % 5 == 0 and s < steps]
            expected += [] if episode.terminated else [steps]
            assert np.flatnonzero(episode.observed).tolist() == expected
            assert len(episode.images["agentview"]) == len(expected)
            assert demo.objects.shape == (steps + 1, 10)
    assert sorted(demo.episode.success for demo in rendered.values()) == [False, True]


@pytest.mark.long
def test_a_demonstration_of_another_simulator_is_refused(two_demos, tmp_path):
    other = tmp_path / "other.hdf5"
    shutil.copy(two_demos, other)
    with h5py.File(other, "r+") as stored:
        for group in stored["data"].values():
            group["states"][0, 1] += 0.3  # the first joint
    with pytest.raises(UserError, match=r"leaves its record by .* another version"):
        list(render_demos(other, CAMERAS, every=5))

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.images import STATE_KEYS, RobomimicImageEnv
from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow

STEPS = 10


def make(**changes):
    settings = {"max_episode_steps": STEPS, "cameras": ("agentview",), "image_size": 32} | changes
    return RobomimicImageEnv(env_meta_for("Lift"), **settings)


@pytest.fixture(scope="module")
def dense():
    env = make(cameras=("agentview", "robot0_eye_in_hand"))
    yield env
    env.close()


@pytest.fixture(scope="module")
def sparse():
    env = make(render_every=4)
    yield env
    env.close()


def episode(env, actions, seed=3):
    """Observations and infos of the whole episode."""
    seen = [env.reset(seed=seed)]
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        seen.append((observation, info))
        if terminated or truncated:
            break
    return seen


def image(seen):
    return seen[0]["pixels"]["agentview"]


def test_observation_is_lerobots_layout(dense):
    check_env(dense, skip_render_check=True)
    observation, info = dense.reset(seed=0)
    assert observation["agent_pos"].shape == (9,)
    assert list(observation["pixels"]) == ["agentview", "robot0_eye_in_hand"]
    assert image((observation, info)).shape == (32, 32, 3)
    assert image((observation, info)).std() > 10
    parts = dense.env.robomimic.get_observation()
    expected = np.concatenate([parts[key] for key in STATE_KEYS])
    np.testing.assert_allclose(observation["agent_pos"], expected, rtol=1e-6)


def test_frames_are_taken_at_decisions_and_where_the_limit_cuts(sparse, restless_actions):
    seen = episode(sparse, restless_actions(STEPS, 0))
    assert [t for t, (_, info) in enumerate(seen) if info["frame_is_new"]] == [0, 4, 8, 10]
    for t, now in enumerate(seen):
        shown = max(s for s in (0, 4, 8, 10) if s <= t)
        np.testing.assert_array_equal(image(now), image(seen[shown]))
    assert (image(seen[4]) != image(seen[0])).any()


def test_frames_and_states_do_not_depend_on_how_often_one_looks(dense, sparse, restless_actions):
    actions = restless_actions(STEPS, 1)
    often, seldom = episode(dense, actions), episode(sparse, actions)
    for t, (ours, theirs) in enumerate(zip(seldom, often, strict=True)):
        np.testing.assert_array_equal(ours[0]["agent_pos"], theirs[0]["agent_pos"])
        if ours[1]["frame_is_new"]:
            np.testing.assert_array_equal(image(ours), image(theirs), err_msg=str(t))


def test_an_episode_is_seen_the_same_whatever_came_before(dense, restless_actions):
    actions = restless_actions(4, 2)
    first = episode(dense, actions, seed=5)
    episode(dense, restless_actions(6, 3), seed=6)
    for now, before in zip(episode(dense, actions, seed=5), first, strict=True):
        np.testing.assert_array_equal(image(now), image(before))


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="render_every is 0"):
        make(render_every=0)
    with pytest.raises(UserError, match="cameras is empty"):
        make(cameras=())
    with pytest.raises(UserError, match=r"Lift has no camera \['top'\]; it has .*agentview"):
        make(cameras=("top",))

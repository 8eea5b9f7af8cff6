import os
import random
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vla_trqam.envs.robomimic.env import RobomimicEnv, create_robomimic_env, env_meta_for
from vla_trqam.errors import UserError


def model_arrays(model):
    names = [n for n in dir(model) if not n.startswith("_")]
    values = {n: getattr(model, n) for n in names}
    return {
        n: np.array(v)
        for n, v in values.items()
        if isinstance(v, np.ndarray) and v.dtype.kind in "fiu"
    }


def states_after(env, seed, actions):
    env.reset(seed=seed)
    return np.stack([env.sim_state(), *(env.step(a) and env.sim_state() for a in actions)])


def test_lift_is_a_valid_gymnasium_environment_with_19_numbers(lift):
    check_env(lift, skip_render_check=True)
    assert lift.observation_space.shape == (19,)
    assert lift.action_space.shape == (7,)


def test_square_shows_23_numbers(square):
    assert square.observation_space.shape == (23,)


def test_observation_is_the_keys_of_robomimic_in_order(lift):
    observation, _ = lift.reset(seed=3)
    parts = lift.robomimic.get_observation()
    keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    np.testing.assert_allclose(observation, np.concatenate([parts[k] for k in keys]), rtol=1e-6)


@pytest.mark.parametrize("task", ["lift", "square"])
def test_reset_gives_the_model_and_state_of_robosuites_own_rebuild(task, request):
    env, stock = request.getfixturevalue(task), request.getfixturevalue(f"stock_{task}")
    assert stock.env.hard_reset
    for seed in (1, 2):
        env.reset(seed=seed)
        np.random.seed(seed)
        stock.reset()
        np.testing.assert_array_equal(env.sim_state(), stock.get_state()["states"])
        expected = model_arrays(stock.env.sim.model._model)
        for name, values in model_arrays(env.robosuite.sim.model._model).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-12, err_msg=name)


def test_cube_size_differs_between_seeds(lift):
    sizes = []
    for seed in (1, 2):
        lift.reset(seed=seed)
        body = lift.robosuite.cube_body_id
        model = lift.robosuite.sim.model._model
        sizes.append(np.array(model.geom_size[model.body_geomadr[body]]))
    assert (sizes[0] != sizes[1]).all()


def test_an_episode_does_not_depend_on_what_happened_before(lift, restless_actions):
    actions = restless_actions(12, 0)
    first = states_after(lift, 7, actions)
    states_after(lift, 8, restless_actions(12, 1))
    np.testing.assert_array_equal(states_after(lift, 7, actions), first)
    assert (states_after(lift, 8, actions)[0] != first[0]).any()


def test_reset_leaves_the_callers_generators_alone(lift):
    np.random.seed(4)
    random.seed(4)
    expected = np.random.random(), random.random()
    np.random.seed(4)
    random.seed(4)
    lift.reset(seed=1)
    assert (np.random.random(), random.random()) == expected


def test_reset_without_a_seed_goes_on_from_the_last_one(lift):
    def second_state():
        lift.reset(seed=6)
        lift.reset()
        return lift.sim_state()

    first = second_state()
    np.testing.assert_array_equal(second_state(), first)
    lift.reset()
    assert (lift.sim_state() != first).any()


def lifted_cube_state(env):
    env.reset(seed=0)
    state = env.sim_state()
    address = env.robosuite.sim.model.get_joint_qpos_addr(env.robosuite.cube.joints[0])[0]
    state[1 + address + 2] = 0.95  # height of the cube; the table's top is at 0.8
    return state


def test_success_terminates_with_reward_one(lift):
    _, info = lift.reset(options={"state": lifted_cube_state(lift)})
    assert info["is_success"]
    _, reward, terminated, truncated, info = lift.step(np.zeros(7))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


def test_step_limit_truncates_without_reward():
    env = RobomimicEnv(env_meta_for("Lift"), max_episode_steps=3)
    env.reset(seed=0)
    flags = [env.step(np.zeros(7))[1:4] for _ in range(3)]
    env.close()
    assert flags == [(0.0, False, False), (0.0, False, False), (0.0, False, True)]


def test_reset_to_a_state_depends_on_nothing_else(lift, restless_actions):
    lift.reset(seed=11)
    for action in restless_actions(10, 2):
        lift.step(action)
    state, outcomes = lift.sim_state(), []
    for earlier in (1, 2):
        lift.reset(seed=earlier)
        lift.step(np.ones(7))
        observation, _ = lift.reset(seed=0, options={"state": state})
        np.testing.assert_array_equal(lift.sim_state(), state)
        outcomes.append([observation, *(lift.step(a)[0] for a in restless_actions(5, 3))])
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


def test_actions_beyond_one_are_executed_as_clipped(lift, restless_actions):
    actions = restless_actions(10, 4)
    assert (np.abs(actions) > 1).any()
    np.testing.assert_array_equal(
        states_after(lift, 1, actions), states_after(lift, 1, np.clip(actions, -1, 1))
    )


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.zeros(6), np.zeros((1, 7))])
def test_malformed_actions_are_refused(lift, action):
    lift.reset(seed=0)
    with pytest.raises(ValueError, match="finite numbers"):
        lift.step(action)


def test_bad_reset_options_are_refused(lift):
    with pytest.raises(UserError, match="'sate'"):
        lift.reset(options={"sate": np.zeros(32)})
    with pytest.raises(UserError, match=r"shape \(3,\).*\(32,\)"):
        lift.reset(options={"state": np.zeros(3)})


def test_bad_arguments_are_refused(lift):
    with pytest.raises(UserError, match="max_episode_steps is 0"):
        RobomimicEnv(env_meta_for("Lift"), max_episode_steps=0)
    with pytest.raises(UserError, match="no task 'Lif'"):
        create_robomimic_env(env_meta_for("Lift") | {"env_name": "Lif"})
    with pytest.raises(UserError, match="robot0_eef_poss"):
        RobomimicEnv(env_meta_for("Lift"), max_episode_steps=9, obs_keys=["robot0_eef_poss"])
    with pytest.raises(UserError, match="render_offscreen"):
        lift.render()


def test_a_gl_platform_that_robosuite_would_replace_is_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(UserError, match="MUJOCO_GL=glfw"):
        create_robomimic_env(env_meta_for("Lift"), render_offscreen=True)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [None, "osmesa"])
def test_the_environment_variable_is_left_as_the_user_has_it(chosen):
    """In a process of its own: what sets it is robosuite's import, which comes once a process."""
    code = (
        "import os\n"
        "from vla_trqam.envs.robomimic.env import create_robomimic_env, env_meta_for\n"
        "create_robomimic_env(env_meta_for('Lift'))\n"
        "print('left as', os.environ.get('MUJOCO_GL'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    environment |= {} if chosen is None else {"MUJOCO_GL": chosen}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    if chosen is not None and "install its GL library" in done.stderr:
        pytest.skip(f"no {chosen} here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"left as {chosen}"

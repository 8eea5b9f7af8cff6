import numpy as np
import pytest

from vla_trqam.envs.robomimic.env import RobomimicEnv, env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.errors import UserError


def arm_settings(env_meta):
    return env_meta["env_kwargs"]["controller_configs"]["body_parts"]["right"]


@pytest.mark.parametrize(
    ("task", "frame", "lite_physics"),
    [("Lift", "world", False), ("NutAssemblySquare", "base", True)],
)
def test_fast_step_equals_the_stock_step_over_150_steps(
    task, frame, lite_physics, restless_actions
):
    env_meta = env_meta_for(task)
    env_meta["env_kwargs"]["lite_physics"] = lite_physics
    arm_settings(env_meta)["input_ref_frame"] = frame
    fast = RobomimicEnv(env_meta, max_episode_steps=150, fast_step=True)
    stock = RobomimicEnv(env_meta, max_episode_steps=150, fast_step=False)
    first, _ = fast.reset(seed=5)
    np.testing.assert_array_equal(first, stock.reset(seed=5)[0])
    for action in restless_actions(150, 5):
        got, expected = fast.step(action), stock.step(action)
        np.testing.assert_allclose(fast.sim_state(), stock.sim_state(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-12)
        assert got[1:] == expected[1:]
    assert np.abs(got[0] - first).max() > 0.1
    middle = {"state": fast.sim_state()}
    for env in (fast, stock):
        env.reset(seed=1, options=middle)
    for action in restless_actions(5, 6):
        np.testing.assert_array_equal(fast.step(action)[0], stock.step(action)[0])
    fast.close()
    stock.close()


def test_all_sensors_equal_the_stock_ones(stock_square, restless_actions):
    robot = [k for k in stock_square.get_observation() if k.startswith("robot0")]
    keys = [*robot, "object"]
    fast, stock = (
        RobomimicEnv(env_meta_for("PickPlaceCan"), max_episode_steps=9, obs_keys=keys, fast_step=f)
        for f in (True, False)
    )
    np.testing.assert_array_equal(fast.reset(seed=1)[0], stock.reset(seed=1)[0])
    for action in restless_actions(5, 1):
        np.testing.assert_array_equal(fast.step(action)[0], stock.step(action)[0])
    fast.close()
    stock.close()


def test_sample_clock_ticks_when_robosuites_sensors_sample(lift):
    from robosuite.utils.observables import Observable, sensor

    from vla_trqam.envs.robomimic.osc_step import SampleClock

    samples = []

    @sensor(modality="test")
    def counting(obs_cache):
        samples.append(1)
        return np.zeros(2)

    observable = Observable(name="test", sensor=counting, sampling_rate=20)
    observable.update(timestep=0.002, obs_cache={}, force=True)
    clock = SampleClock(observable, 0.002)
    for _ in range(25 * 2000):  # long enough for rounding errors to add up
        before = len(samples)
        observable.update(timestep=0.002, obs_cache={})
        assert clock.tick() == (len(samples) > before)


def test_another_controller_is_refused_by_the_fast_step_and_runs_in_the_stock_one():
    env_meta = env_meta_for("Lift")
    arm_settings(env_meta)["impedance_mode"] = "variable_kp"
    with pytest.raises(UserError, match=r"impedance_mode 'fixed'.*fast_step=False"):
        RobomimicEnv(env_meta, max_episode_steps=9, fast_step=True)
    states = []
    for choice in (None, False):  # a run asks for neither
        env = RobomimicEnv(env_meta, max_episode_steps=9, fast_step=choice)
        env.reset(seed=0)
        states.append(env.step(np.full(13, 0.1))[0])
        env.close()
    np.testing.assert_array_equal(*states)


def test_two_arms_act_where_the_file_says_that_an_action_is_of_both():
    two = env_meta_for("Lift")
    two["env_name"] = "TwoArmLift"
    two["env_kwargs"]["robots"] = ["Panda", "Panda"]
    keys = ("robot0_eef_pos", "robot1_eef_pos")
    family = robomimic_family(two, max_episode_steps=9, obs_keys=keys, action_size=14)
    env = family.make(False)
    start, _ = env.reset(seed=0)
    assert env.action_space.shape == (family.action_size,) == (14,)
    action = np.zeros(14)
    action[7:10] = 1.0  # of the second arm alone
    for _ in range(5):
        state, *_ = env.step(action)
    moved = np.abs(state - start)
    assert moved[:3].max() < 0.01 < moved[3:].max()
    env.close()

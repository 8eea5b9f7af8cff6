"""OGBench's single tasks as a family."""

import re

import gymnasium
import mujoco
import numpy as np
import pytest
from family_contract import FamilyContract

from vla_trqam.data.sampling import RewardSpec
from vla_trqam.envs.ogbench.family import ogbench_family, task_names
from vla_trqam.errors import UserError

ogbench = pytest.importorskip("ogbench", reason="uv sync --extra ogbench")
relabel_dataset = pytest.importorskip("ogbench.relabel_utils").relabel_dataset
MAZE = "pointmaze-medium-navigate-singletask-task1-v0"


def to_the_goal(env):
    """Steps of a point that knows the maze; OGBench judges the state before an action."""
    env.reset(seed=2)
    inner, actions = env.unwrapped, []
    ended = False
    while not ended:
        subgoal, _ = inner.get_oracle_subgoal(inner.get_xy(), inner.cur_goal_xy)
        heading = subgoal - inner.get_xy()
        actions.append((heading / max(np.linalg.norm(heading), 1.0)).astype(np.float32))
        _, _, terminated, truncated, _ = env.step(actions[-1])
        ended = terminated or truncated
    return 2, np.array(actions)


class TestPointmaze(FamilyContract):
    def make_family(self):
        return ogbench_family(MAZE, max_episode_steps=200)

    def winner(self, env):
        return to_the_goal(env)


@pytest.mark.slow
class TestCube(FamilyContract):
    def make_family(self):
        return ogbench_family("cube-double-play-singletask-task2-v0", max_episode_steps=10)


def test_what_the_solver_starts_from_is_of_the_seed_too():
    """A reset executes random actions of a space that the arm's tasks make anew at every look."""
    env = ogbench_family("cube-single-play-singletask-v0", max_episode_steps=5).make(False)
    starts = []
    for _ in range(2):
        env.reset(seed=5)
        data = env.unwrapped._data
        starts.append(np.concatenate([data.ctrl, data.qacc_warmstart]))
        env.step(np.ones(5, np.float32))
    np.testing.assert_array_equal(*starts)
    assert (starts[0] != 0).any()


def test_the_fifty_tasks_are_ogbenchs():
    registered = {re.sub("-(navigate|play)", "", name) for name in task_names()}
    assert len(task_names()) == len(registered) == 50
    assert registered <= gymnasium.registry.keys()


def test_a_task_has_ogbenchs_own_limit_and_control_rate():
    family = ogbench_family(MAZE)
    assert (family.max_episode_steps, family.control_rate, family.state_size) == (1000, 10, 2)
    assert family.action_limits == (-1.0, 1.0)


def test_our_rewards_less_one_are_ogbenchs_own():
    """To the step: OGBench judges the state before the action, and so do we."""
    env = ogbench_family(MAZE, max_episode_steps=300).make(False)
    seed, actions = to_the_goal(env)
    env.reset(seed=seed)
    ours = np.array([env.step(action)[1] for action in actions])
    env.reset(seed=seed)
    theirs = [env.env.step(action)[1] for action in actions]
    assert (ours - 1.0).tolist() == theirs == [-1.0] * (len(actions) - 1) + [0.0]
    assert "-1 " in RewardSpec("success_minus_one").describe()
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["cube-double-play-singletask-task2-v0", "puzzle-3x3-play-singletask-task4-v0"]
)
def test_a_rollouts_dense_rewards_are_those_that_its_data_is_relabelled_with(task):
    """Minus the missing parts of the state before the action, in a rollout and in data alike."""
    env = ogbench_family(task, max_episode_steps=50, dense=True).make(False)
    env.reset(seed=1)
    inner, rng = env.unwrapped, np.random.default_rng(0)
    rows, rewards = [], []
    for missing in (2, 1, 2, 0):
        put_right_but(missing, inner)
        rows.append(
            (inner._data.qpos.copy(), getattr(inner, "_cur_button_states", np.zeros(1)).copy())
        )
        _, reward, ended, _, info = env.step(rng.uniform(-0.1, 0.1, 5).astype(np.float32))
        rewards.append(reward)
        assert info["is_success"] == ended == (missing == 0)
    qpos, buttons = map(np.array, zip(*rows, strict=True))
    dataset = {"qpos": qpos, "button_states": buttons}
    relabel_dataset(task, env.env, dataset)
    assert rewards == dataset["rewards"].tolist() == [-2.0, -1.0, -2.0, 0.0]
    env.close()


def put_right_but(missing, inner):
    """All parts of the task are at their goals but so many."""
    if hasattr(inner, "_target_button_states"):
        inner._cur_button_states = inner._target_button_states.copy()
        inner._cur_button_states[:missing] ^= 1
    for cube in range(getattr(inner, "_num_cubes", 0)):
        away = [0.0, 0.1, 0.0] if cube < missing else np.zeros(3)
        inner._data.joint(f"object_joint_{cube}").qpos[:3] = inner._data.mocap_pos[cube] + away
    mujoco.mj_forward(inner._model, inner._data)
    inner.post_step()  # which looks whether all are


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "--env.task=None is none of OGBench's single tasks"),
        ("cube-double-play-v0", "is none of OGBench's single tasks"),
        ("visual-cube-double-play-singletask-task1-v0", "with states"),
        ("cube-twenty-play-singletask-task1-v0", "is no task of OGBench's"),
    ],
)
def test_another_name_is_refused(task, message):
    with pytest.raises(UserError, match=message):
        ogbench_family(task)


def test_where_ogbench_is_missing_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"ogbench, which is not here: uv sync --extra ogbench"):
        ogbench_family(MAZE)

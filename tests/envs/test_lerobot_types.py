"""LeRobot's own code of LIBERO and ALOHA over stand-ins for their simulators."""

import sys
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

from vla_trqam.envs.chunked import ChunkEnv
from vla_trqam.envs.lerobot.family import lerobot_family
from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow  # importing LeRobot takes ten seconds and more
STATES = 50


class Scene:
    """What LIBERO's environment is to LeRobot's code; the hand is where the initial state says."""

    def __init__(self, camera_heights, camera_widths, **_):
        self.picture = np.zeros((camera_heights, camera_widths, 3), np.uint8)
        self.robots = [SimpleNamespace(controller=SimpleNamespace(ee_ori_mat=np.eye(3)))]
        self.state, self.actions = -1.0, []

    def seed(self, seed):
        """Which its initial states do not ask."""

    def reset(self):
        return self.seen()

    def set_init_state(self, state):
        self.state = float(state[0])
        return self.seen()

    def step(self, action):
        self.actions.append(action)
        return self.seen(), 0.0, False, {}

    def check_success(self):
        return False

    def close(self):
        pass

    def seen(self):
        sizes = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "gripper_qvel": 2}
        sizes |= {"joint_pos": 7, "joint_vel": 7}
        seen = {f"robot0_{name}": np.zeros(size) for name, size in sizes.items()}
        seen["robot0_eef_pos"][0], seen["robot0_eef_quat"][3] = self.state, 1.0
        return seen | dict.fromkeys(("agentview_image", "robot0_eye_in_hand_image"), self.picture)


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """Two tasks of fifty initial states."""
    (tmp_path / "p").mkdir()
    torch.save(np.arange(STATES, dtype=float)[:, None], tmp_path / "p/t.pruned_init")
    tasks = [
        SimpleNamespace(
            name=name, language=name, problem_folder="p", bddl_file="b", init_states_file="t.init"
        )
        for name in ("first", "second")
    ]
    (tmp_path / "p/t.pruned_init").rename(tmp_path / "p/t.init")
    suite = SimpleNamespace(tasks=tasks, get_task=tasks.__getitem__)
    modules = {
        "libero": {},
        "libero.libero": {"get_libero_path": lambda _: str(tmp_path)},
        "libero.libero.benchmark": {
            "get_benchmark_dict": lambda: {"libero_10": lambda: suite},
            "Benchmark": object,
        },
        "libero.libero.envs": {"OffScreenRenderEnv": Scene},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["libero.libero"].benchmark = sys.modules["libero.libero.benchmark"]
    sizes = {"observation_height": 16, "observation_width": 16}

    def make(**options):
        options = sizes | options
        return lerobot_family("libero", max_episode_steps=20, task="libero_10", options=options)

    yield make
    sys.modules.pop("lerobot.envs.libero", None)  # it was imported over the stand-ins


def test_the_initial_state_of_libero_is_its_seeds_alone(libero):
    env, other = (libero().make(False) for _ in range(2))
    other.reset(seed=0)
    for seed in (7, 7, 20, 7, 7 + 2 * STATES):
        for each in (env, other):
            state, _ = each.reset(seed=seed)
            assert state[0] == seed // 2 % STATES
            assert each.task_text == ("first", "second")[seed % 2]
    states = [float(env.reset(seed=seed)[0][0]) for seed in range(0, 2 * STATES, 2)]
    assert states == list(range(STATES))
    assert "which training and all evaluations share" in libero().notes[0]


@pytest.mark.parametrize(("mode", "executed"), [("relative", 1.0), ("absolute", 3.0)])
def test_absolute_actions_of_libero_are_not_clipped(libero, mode, executed):
    family = libero(control_mode=mode)
    env = family.make(False)
    chunks = ChunkEnv(env, 1)
    chunks.reset(seed=0)
    _, _, _, _, info = chunks.step(np.full((1, 7), 3.0, np.float32))
    assert env.env.unwrapped._env.actions[-1].tolist() == [executed] * 7
    assert info["chunk_actions"].tolist() == [[executed] * 7]
    assert family.action_limits[1] == (1.0 if mode == "relative" else np.inf)


class Arms(gymnasium.Env):
    """What gym_aloha declares: a box of one for angles of joints."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (14,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {
            "agent_pos": gymnasium.spaces.Box(-1000.0, 1000.0, (14,), np.float64),
            "pixels": gymnasium.spaces.Dict(
                {"top": gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)}
            ),
        }
    )

    def __init__(self, **_):
        self.task = "insertion"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(np.zeros(14)), {}

    def step(self, action):
        return self.seen(action), 0.0, False, False, {"is_success": False}

    def seen(self, angles):
        return {"agent_pos": np.array(angles, float), "pixels": {"top": np.zeros((8, 8, 3), "u1")}}


def test_angles_of_alohas_joints_are_executed_as_lerobot_executes_them(monkeypatch):
    from lerobot.envs.configs import AlohaEnv
    from lerobot.envs.factory import make_env

    monkeypatch.setitem(sys.modules, "gym_aloha", ModuleType("gym_aloha"))
    name = "gym_aloha/AlohaInsertion-v0"
    monkeypatch.setitem(
        gymnasium.registry, name, gymnasium.envs.registration.EnvSpec(name, entry_point=Arms)
    )
    angles = np.linspace(-1.5, 2.5, 14, dtype=np.float32)
    theirs = make_env(AlohaEnv(), n_envs=1)["aloha"][0]
    theirs.reset(seed=[1])
    wanted = theirs.step(angles[None])[0]["agent_pos"][0]
    family = lerobot_family("aloha", max_episode_steps=20)
    env = ChunkEnv(family.make(False), 1)
    env.reset(seed=1)
    state, _, _, _, info = env.step(angles[None])
    np.testing.assert_array_equal(state, wanted.astype(np.float32))
    np.testing.assert_array_equal(info["chunk_actions"][0], angles)
    assert family.action_limits == (-np.inf, np.inf)


def test_one_episode_whatever_the_seed_is_refused():
    with pytest.raises(UserError, match=r"robomme is not played: .* same episode at every seed"):
        lerobot_family("robomme", max_episode_steps=20)

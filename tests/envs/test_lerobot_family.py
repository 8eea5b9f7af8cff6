"""LeRobot's own environments as a family: PushT."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from family_contract import FamilyContract, assert_pictures

from vla_trqam.envs.lerobot.family import lerobot_family
from vla_trqam.envs.lerobot.sight import SightByFormat
from vla_trqam.envs.worker import EnvServer, FrameRecorder, FrameSettings, WorkerSettings
from vla_trqam.errors import UserError

# Importing LeRobot takes ten seconds and more, here and in each simulator process.
pytestmark = pytest.mark.slow
TEXT = "Push the T-shaped block onto the T-shaped target."


@pytest.fixture(scope="module")
def pusht():
    pytest.importorskip("gym_pusht", reason="uv sync --extra pusht")
    return lerobot_family("pusht", max_episode_steps=6)


class TestPushT(FamilyContract):
    single_in_thread = True

    def make_family(self):
        pytest.importorskip("gym_pusht", reason="uv sync --extra pusht")
        return lerobot_family("pusht", max_episode_steps=10)


@pytest.mark.long
class TestMetaWorld(FamilyContract):
    levels = 1  # software rendering of one state differs in a few of two million numbers

    def make_family(self):
        pytest.importorskip("metaworld", reason="uv sync --extra metaworld")
        return lerobot_family("metaworld", task="push-v3", max_episode_steps=6)


def test_a_policy_sees_what_lerobots_evaluation_shows_it(pusht):
    from lerobot.envs.configs import PushtEnv
    from lerobot.envs.factory import make_env
    from lerobot.envs.utils import preprocess_observation

    theirs = make_env(PushtEnv(), n_envs=1)["pusht"][0]
    ours = pusht.make(False)
    action = np.array([400.0, 90.0], np.float32)
    seen, _ = theirs.reset(seed=[7])
    states = [ours.reset(seed=7)[0]]
    for _ in range(3):
        shown = preprocess_observation(seen)
        np.testing.assert_array_equal(states[-1], shown["observation.state"][0].numpy())
        picture = (shown["observation.image"][0] * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours.look()["observation.image"], picture)
        seen, *_ = theirs.step(action[None])
        states.append(ours.step(action)[0])
    assert np.ptp(np.stack(states), axis=0).max() > 10, "the agent stood still"
    theirs.close()
    ours.close()


def test_nothing_is_rendered_between_decisions(pusht, monkeypatch):
    from gym_pusht.envs.pusht import PushTEnv

    env, looks = pusht.make(False), []
    render = PushTEnv._render
    monkeypatch.setattr(PushTEnv, "_render", lambda *a, **k: looks.append(1) or render(*a, **k))
    env.reset(seed=1)
    for _ in range(4):
        env.step(np.array([10.0, 10.0], np.float32))
    assert looks == []
    env.look()
    assert looks == [1]
    env.close()


@pytest.fixture(scope="module")
def metaworld():
    """Two tasks: an even seed plays the first."""
    pytest.importorskip("metaworld", reason="uv sync --extra metaworld")
    return lerobot_family("metaworld", task="reach-v3,drawer-open-v3", max_episode_steps=20)


@pytest.mark.long
def test_a_policy_sees_what_lerobot_shows_it_of_meta_world(metaworld):
    from lerobot.envs.metaworld import MetaworldEnv

    ours = metaworld.make(False)
    assert metaworld.task_texts == ("Reach a goal position", "Open a drawer")
    for seed, task in ((4, "reach-v3"), (7, "drawer-open-v3")):
        theirs = MetaworldEnv(task, obs_type="pixels_agent_pos")
        seen, _ = theirs.reset(seed=seed)
        state, _ = ours.reset(seed=seed)
        assert ours.task_text == metaworld.task_texts[seed % 2]
        for step in range(3):
            np.testing.assert_array_equal(state, seen["agent_pos"].astype(np.float32))
            assert_pictures(ours.look()["observation.image"], seen["pixels"], 1)
            action = np.array([0.5, -0.3, 0.2 * step, 1.0], np.float32)
            state, *_ = ours.step(action)
            seen, *_ = theirs.step(action)
        theirs.close()
    ours.close()


@pytest.mark.long
def test_meta_world_renders_where_somebody_looks(metaworld):
    from lerobot.envs.metaworld import MetaworldEnv

    env, looks = metaworld.make(False), []
    with pytest.MonkeyPatch.context() as patch:
        env.reset(seed=0)
        render = type(env.env.unwrapped._env).render
        patch.setattr(
            type(env.env.unwrapped._env), "render", lambda self: looks.append(1) or render(self)
        )
        for _ in range(5):
            env.step(np.zeros(4, np.float32))
        assert looks == []
        env.look()
        assert looks == [1]
    assert isinstance(env.env.unwrapped, MetaworldEnv)
    env.close()


@pytest.mark.long
def test_tasks_of_one_process_are_drawn_as_each_alone():
    """Each at its second turn, when another's simulator was the last to be made."""
    pytest.importorskip("metaworld", reason="uv sync --extra metaworld")
    names = ("button-press-v3", "door-unlock-v3")
    suite = lerobot_family("metaworld", task=",".join(names), max_episode_steps=6).make(False)
    for seed in range(4):
        state, _ = suite.reset(seed=seed)
        one = lerobot_family("metaworld", task=names[seed % 2], max_episode_steps=6).make(False)
        alone, _ = one.reset(seed=seed)
        np.testing.assert_array_equal(state, alone)
        seen = suite.look()["observation.image"]
        assert_pictures(seen, one.look()["observation.image"], 1)
        one.close()
    suite.close()


class Viewer:
    """Draws what the last of them to be made current has loaded."""

    current: ClassVar["Viewer | None"] = None

    def __init__(self, level):
        self.level = level
        self.make_context_current()

    def make_context_current(self):
        Viewer.current = self


class Drawn:
    """A Meta-World task of LeRobot's, as far as its sight knows it."""

    observation_height = observation_width = 2

    def __init__(self, level):
        self._env, self.level = None, level

    def start(self):
        self._env = SimpleNamespace(mujoco_renderer=SimpleNamespace(viewer=Viewer(self.level)))

    def _format_raw_obs(self, raw):
        return {"pixels": self.render(), "agent_pos": raw[:4]}

    def render(self):
        assert Viewer.current is not None
        return np.full((2, 2, 3), Viewer.current.level)


def test_every_task_is_drawn_with_what_was_loaded_for_it():
    tasks = [Drawn(level) for level in (3, 7)]
    sights = [SightByFormat(task) for task in tasks]
    for task in tasks:
        task.start()
    for turn in (0, 1, 1, 0):
        tasks[turn]._format_raw_obs(np.arange(39.0))
        seen = sights[turn].open()
        assert seen["pixels"].max() == seen["pixels"].min() == tasks[turn].level
        assert tasks[1 - turn].render().max() == tasks[1 - turn].level, "as a film asks for it"


def test_pusht_is_solved_where_the_block_lies_on_its_target(pusht):
    """The initial state is LeRobot's option, for nobody solves this task by a script."""
    env = pusht.make(False)
    env.reset(seed=1, options={"reset_to_state": [10.0, 10.0, 224.18, 242.82, np.pi / 4]})
    _, reward, terminated, truncated, info = env.step(np.array([10.0, 10.0], np.float32))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)
    env.close()


def test_the_texts_and_sizes_are_lerobots(pusht):
    assert pusht.task_texts == (TEXT,)
    assert (pusht.task, pusht.control_rate, pusht.state_size) == ("PushT-v0", 10, 2)
    assert pusht.action_limits == (0.0, 512.0)
    assert pusht.cameras == {"observation.image": (96, 96, 3)}


def test_an_instruction_of_ones_own_takes_the_place_of_the_text(pusht):
    family = lerobot_family("pusht", max_episode_steps=6, instruction="push it")
    env = family.make(False)
    env.reset(seed=3)
    assert (family.task_texts, env.task_text) == (("push it",), "push it")
    env.close()


class Counter(gymnasium.Env):
    """Succeeds after three steps of more than 1; its reset draws from the seed."""

    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {
            "agent_pos": gymnasium.spaces.Box(-9.0, 9.0, (1,), np.float64),
            "pixels": gymnasium.spaces.Dict(
                {"top": gymnasium.spaces.Box(0, 255, (8, 9, 3), np.uint8)}
            ),
        }
    )

    def __init__(self, text):
        self.task_description, self._max_episode_steps = text, 20

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.steps = self.np_random.uniform(), 0
        return self.seen(), {}

    def step(self, action):
        self.steps += int(action[0] > 1)
        return self.seen(), 0.3, False, False, {"is_success": self.steps == 3}

    def seen(self):
        image = np.full((8, 9, 3), self.steps, np.uint8)
        return {"agent_pos": np.array([self.start + self.steps]), "pixels": {"top": image}}


class Restless(Counter):
    """Names its task when it starts, and starts again when it has succeeded, as some of theirs."""

    def reset(self, *, seed=None, options=None):
        started = super().reset(seed=seed, options=options)
        self.task_description = f"bring the {'apple' if seed % 4 < 2 else 'mug'}"
        return started

    def step(self, action):
        seen, *rest = super().step(action)
        if self.steps == 3:
            self.reset()
        return seen, *rest

    def render(self):
        return self.seen()["pixels"]["top"]


def suite_of(kind, monkeypatch):
    """A type of two tasks, as a plugin would bring it."""
    from lerobot.envs.configs import EnvConfig

    @dataclass
    class SuiteConfig(EnvConfig):
        gym_kwargs: ClassVar[dict] = {}

        def create_envs(self, n_envs, use_async_envs=False):
            make = gymnasium.vector.SyncVectorEnv
            return {"suite": {k: make([lambda k=k: kind(f"task {k}")]) for k in range(2)}}

    monkeypatch.setitem(EnvConfig._choice_registry, "suite", SuiteConfig)
    return lerobot_family("suite", max_episode_steps=5)


@pytest.fixture
def suite(monkeypatch):
    return suite_of(Counter, monkeypatch)


@pytest.fixture
def restless(monkeypatch):
    return suite_of(Restless, monkeypatch)


def test_of_a_suite_the_seed_decides_the_task(suite):
    env = suite.make(False)
    assert suite.task_texts == ("task 0", "task 1")
    for seed in (4, 7, 8):
        env.reset(seed=seed)
        assert env.task_text == f"task {seed % 2}"


def test_a_task_that_is_named_when_an_episode_starts_is_what_the_policy_is_told(restless):
    env = restless.make(False)
    told = []
    for seed in (0, 1, 2, 3):
        env.reset(seed=seed)
        told.append(env.task_text)
    assert told == ["bring the apple"] * 2 + ["bring the mug"] * 2


def test_an_environment_that_starts_again_by_itself_is_left_as_it_ended(restless):
    """So that a film's last frame is of the episode."""
    env = FrameRecorder(restless.make(True))
    env.configure(FrameSettings(every=1, height=8, width=9))
    for _ in range(2):
        env.reset(seed=1)
        while not env.step(np.array([2.0], np.float32))[2]:
            pass
        assert [int(frame.max()) for frame in env.frames] == [0, 1, 2, 3]


def test_success_that_ends_no_episode_there_ends_it_here(suite):
    env = suite.make(False)
    env.reset(seed=1)
    outcomes = [env.step(np.array([2.0], np.float32))[1:4] for _ in range(3)]
    assert outcomes == [(0.0, False, False)] * 2 + [(1.0, True, False)]


def test_cameras_have_lerobots_names_and_show_the_last_step(suite):
    env = suite.make(False)
    env.reset(seed=1)
    env.step(np.array([2.0], np.float32))
    assert suite.cameras == {"top": (8, 9, 3)}
    np.testing.assert_array_equal(env.look()["top"], np.ones((8, 9, 3), np.uint8))


@pytest.mark.parametrize("shown", [["top"], []])
def test_a_worker_hands_on_the_cameras_that_are_asked_for(suite, shown):
    cameras = tuple(suite.showing([*shown, "wrist"]).cameras)
    server = EnvServer(WorkerSettings(suite.make, False, 2, cameras))
    *_, images, text = server.answer(("reset", 1, None))
    assert (list(images), text) == (shown, "task 1")
    _, _, images, *_ = server.answer(("chunk", np.zeros((2, 1), np.float32)))
    assert list(images) == shown


def test_a_limit_beyond_the_environments_own_is_refused(suite):
    with pytest.raises(UserError, match=r"max_episode_steps=21 is more than the 20 steps"):
        lerobot_family("suite", max_episode_steps=21)


REFUSED = {
    "an unknown type": ("pushed", {}, "--env.type=pushed is not known; there are robomimic, ogb"),
    "code from the Hub": ("isaaclab_arena", {}, "would run code from the Hub"),
    "an unknown option": ("pusht", {"options": {"size": 3}}, "--env.options has size; of .* fps"),
    "a limit twice": (
        "pusht",
        {"options": {"episode_length": 9}},
        "--env.options has episode_length, which is --eval.max_episode_steps's",
    ),
    "an option of another kind": ("pusht", {"options": {"fps": "fast"}}, "do not suit pusht"),
    "no pictures": ("pusht", {"options": {"obs_type": "state"}}, "obs_type: pixels_agent_pos"),
    "an unknown task": ("pusht", {"task": "PushT-v9"}, "LeRobot does not make --env.type=pusht"),
    "another simulator": ("aloha", {}, r"not here .*: uv pip install 'lerobot\[aloha\]==0.6.1'"),
}


@pytest.mark.parametrize(("env_type", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_lerobot_does_not_make_is_refused_in_a_sentence(env_type, settings, message):
    pytest.importorskip("gym_pusht", reason="uv sync --extra pusht")
    with pytest.raises(UserError, match=message):
        lerobot_family(env_type, max_episode_steps=6, **settings)


def test_where_pusht_is_missing_the_command_that_installs_it_is_named(monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("no gym_pusht")

    monkeypatch.setattr("lerobot.envs.factory.make_env", missing)
    with pytest.raises(UserError, match=r"not here \(no gym_pusht\): uv sync --extra pusht"):
        lerobot_family("pusht", max_episode_steps=6)

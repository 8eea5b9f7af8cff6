"""The recipe for OGBench, on a maze played in this process."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import yaml
from toy_deaths import dies_at_update
from toy_files import differences, final_state, metrics_lines
from toy_settings import TINY
from toy_task import Killed
from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.recipes import finetune_ogbench, make_ogbench_data

from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.parsing import dump_config
from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.window import Window
from vla_trqam.engine import finetune as engine
from vla_trqam.errors import UserError
from vla_trqam.jobs import states
from vla_trqam.methods.fql import FQL
from vla_trqam.methods.trqam import TRQAM

pytest.importorskip("ogbench", reason="uv sync --extra ogbench")
OWN = ("--dataset.obs_keys", "--pretrain.filter_key", "--pretrain.num_demos", "--eval.max")
FLAGS = [flag for flag in TINY if not flag.startswith(OWN)] + ["--eval.max_episode_steps=12"]


class PoolHere:
    """`RolloutPool` without processes."""

    def __init__(self, family, **_):
        self.family, self.env = family, family.make(False)

    def run(self, policy, seeds, *, on_episode=None):
        episodes = [self.play(policy, seed) for seed in seeds]
        for episode in episodes if on_episode else ():
            on_episode(episode)
        return episodes

    def play(self, policy, seed):
        state, _ = self.env.reset(seed=seed)
        states, actions, rewards, chunk, number = [state], [], [], [], 0
        ended = cut = False
        while not (ended or cut):
            if not chunk:
                chunk = list(policy(states[-1][None], np.array([seed]), np.array([number]))[0])
                number += 1
            actions.append(np.clip(chunk.pop(0), -1.0, 1.0).astype(np.float32))
            state, reward, ended, cut, _ = self.env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
        parts = np.stack(states), np.stack(actions), np.array(rewards, np.float32)
        return Episode(*parts, terminated=ended, truncated=cut, success=ended, seed=seed)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.env.close()


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "maze.npz"
    flags = ["--dataset=pointmaze-medium-navigate-v0", "--episodes=4", "--steps=300"]
    assert make_ogbench_data.main([*flags, "--workers=0", f"--output={path}"]) == 0
    return path


@pytest.fixture
def tiny(maze, monkeypatch):
    monkeypatch.setattr(engine, "RolloutPool", PoolHere)

    def run(folder, *flags):
        given = [f"--dataset.path={maze}", *FLAGS, f"--output_dir={folder}"]
        return finetune_ogbench.main([*given, *flags])

    return run


@pytest.mark.slow
def test_a_run_goes_whole_to_its_report(tiny, tmp_path, capsys):
    flags = ["--method.type=fql", "--method.hidden_dims=[16]"]
    assert tiny(tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert "cut after 12 steps, where OGBench cuts after 1000" in said
    assert "pretrain: 4 trajectories in 1 files, 1200 steps" in said
    report = (tmp_path / "run/report.md").read_text()
    assert report.startswith("# FQL on pointmaze-medium-navigate-singletask-task1-v0")
    outcome = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert len(outcome["base_steps"]) == len(outcome["tuned_steps"]) == 2
    phases = {line["phase"] for line in metrics_lines(tmp_path / "run")}
    assert phases >= {"pretrain", "offline", "online", "eval"}


@pytest.mark.parametrize(
    ("name", "method", "knobs"),
    [("trqam", TRQAM, []), ("fql", FQL, ["--method.hidden_dims=[16]"])],
)
def test_a_killed_run_goes_on_to_the_same_bits(name, method, knobs, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "conclude", lambda *_, **__: None)
    flags = [f"--method.type={name}", *knobs]
    assert tiny(tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, method, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    resume = ["--resume=true", f"--output_dir={tmp_path / 'killed'}"]
    assert finetune_ogbench.main(resume) == 0
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    flags = ["--dataset=pointmaze-medium-navigate-v0", "--episodes=2", "--steps=150"]
    given = [*flags, "--workers=0", "--shards=3", f"--output={folder}"]
    assert make_ogbench_data.main(given) == 0
    return folder


@pytest.mark.parametrize("update", [5, 11])
def test_a_killed_run_goes_on_with_the_file_whose_turn_it_was(
    update, tiny, shards, tmp_path, monkeypatch
):
    """Of 6 updates of cloning, 6 offline and 6 online, with another file after every 4 of them."""
    turns = []

    def watched(self, turn):
        turns.append(turn)
        turn_to(self, turn)

    turn_to = Window.turn_to
    monkeypatch.setattr(Window, "turn_to", watched)
    monkeypatch.setattr(engine, "conclude", lambda *_, **__: None)
    flags = [f"--dataset.path={shards}", "--dataset.swap_every=4", "--dataset.reward=dense"]
    assert tiny(tmp_path / "whole", *flags) == 0
    assert turns == sorted(turns)
    assert [turns.count(turn) for turn in range(6)] == [6, 5, 4, 5, 2, 0], "each phase asks twice"
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, update)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    turns.clear()
    resume = ["--resume=true", f"--output_dir={tmp_path / 'killed'}"]
    assert finetune_ogbench.main(resume) == 0
    assert turns[-1] == 4
    assert len(turns) < 20, "it went on, and did not begin anew"
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []
    replay = Replay.open(tmp_path / "whole/replay")
    assert set(replay.episodes().source) == {"offline", "online"}, "the files are not copied"
    rewards = set(np.unique(replay.rewards))
    assert rewards == {-1.0}, "of OGBench's own"


@pytest.mark.slow
def test_a_run_with_files_in_turn_goes_whole_to_its_report(tiny, shards, tmp_path, capsys):
    flags = [f"--dataset.path={shards}", "--dataset.swap_every=4", "--online.fraction=0.5"]
    assert tiny(tmp_path / "run", *flags) == 0
    assert "pretrain: 3 files of 302 states, one in memory at a time" in capsys.readouterr().out
    assert (tmp_path / "run/report.md").is_file()


def test_files_of_two_sizes_do_not_take_turns(tiny, maze, shards, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    shutil.copy(maze, folder / "the-other.npz")
    assert tiny(tmp_path / "run", f"--dataset.path={folder}", "--dataset.swap_every=4") == 2
    said = capsys.readouterr().err
    assert "the-other.npz has 1204 states and" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_replay_begins_with_the_data_and_the_policy_with_its_moments(
    tiny, maze, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "conclude", lambda *_, **__: None)
    assert tiny(tmp_path / "run", "--online.steps=0") == 0
    replay = Replay.open(tmp_path / "run/replay")
    assert replay.stats.by_source["pretrain"].steps == 1200
    assert replay.stats.by_source["offline"].episodes == 2, "the base's"
    rows = np.load(maze)["observations"]
    base = MLPFlowPolicy.from_pretrained(tmp_path / "run/base_policy")
    buffers = dict(base.named_buffers())
    found = [np.allclose(b, rows.mean(axis=0), atol=1e-4) for b in buffers.values()]
    assert any(found), list(buffers)


def test_data_of_another_task_is_refused_before_there_is_a_folder(tiny, tmp_path, capsys):
    assert tiny(tmp_path / "run", "--env.task=cube-single-play-singletask-task2-v0") == 2
    assert "has observations of 2 numbers, the task cube-single-play" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_gone_on_with_on_other_data(tiny, maze, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "conclude", lambda *_, **__: None)
    copy = tmp_path / "maze.npz"
    copy.write_bytes(maze.read_bytes())
    assert tiny(tmp_path / "run", f"--dataset.path={copy}", "--online.steps=0") == 0
    copy.write_bytes(maze.with_name("maze-val.npz").read_bytes())
    assert finetune_ogbench.main(["--resume=true", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "is not the one that the run" in capsys.readouterr().err


def test_the_command_that_began_a_run_of_a_domain_takes_resume(tmp_path, capsys):
    """The paper's settings of the domain are the preset's, also where the run is gone on with."""
    task = "--env.task=cube-double-play-singletask-task2-v0"
    flags = ["--preset=paper", task, f"--output_dir={tmp_path}"]
    read = partial(states.read_config, FinetuneOGBenchConfig, finetune_ogbench.PRESETS)
    begun = read(flags)
    dump_config(begun, tmp_path / "config.yaml")
    assert read([*flags, "--resume=true"]).dataset.reward == begun.dataset.reward == "dense"
    with pytest.raises(UserError, match="leave out --preset"):
        read([*flags[1:], "--preset=scene", "--resume=true"])


LIMITS = {"default": 600, "cube_single": 200, "puzzle_3x3": 500, "scene": 500, "paper": 500}


def test_every_preset_is_of_a_task_that_there_is():
    assert list(yaml.safe_load(finetune_ogbench.PRESETS.read_text())) == list(LIMITS)
    for preset, steps in LIMITS.items():
        config = states.read_config(
            FinetuneOGBenchConfig, finetune_ogbench.PRESETS, [f"--preset={preset}"]
        )
        assert config.eval.max_episode_steps == steps
        assert "singletask" in config.env.task

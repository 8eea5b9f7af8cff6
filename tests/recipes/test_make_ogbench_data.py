"""Data for OGBench made here: its format, what resuming gives, who plays."""

import json
from dataclasses import replace

import numpy as np
import pytest
from vla_trqam.recipes import make_ogbench_data as recipe

from vla_trqam.envs.ogbench import oracles
from vla_trqam.envs.ogbench.oracles import PlayPlan, make_player, play

ogbench = pytest.importorskip("ogbench", reason="uv sync --extra ogbench")
MAZE = "pointmaze-medium-navigate-v0"


def run(output, *more):
    flags = (f"--dataset={MAZE}", "--episodes=3", "--steps=40", "--workers=0")
    return recipe.main([*flags, f"--output={output}", *more])


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def same(first, second):
    one, other = arrays(first), arrays(second)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_ogbenchs_own_loader_reads_it(tmp_path, capsys):
    assert run(tmp_path / f"{MAZE}.npz") == 0
    assert "3 episodes of 40 steps" in capsys.readouterr().out
    task = "pointmaze-medium-navigate-singletask-task1-v0"
    env, train, val = ogbench.make_env_and_datasets(task, dataset_dir=str(tmp_path))
    env.close()
    assert train["observations"].shape == (120, 2)
    assert len(val["observations"]) == 40
    np.testing.assert_array_equal(np.flatnonzero(train["terminals"]), [39, 79, 119])
    # A step of the point is 0.2 of its action, where no wall is.
    moved = train["next_observations"] - train["observations"]
    free = np.isclose(moved, 0.2 * train["actions"], atol=1e-4).all(axis=1)
    assert free.mean() > 0.5
    assert {path.name for path in tmp_path.iterdir()} == {f"{MAZE}.npz", f"{MAZE}-val.npz"}


def test_a_stopped_command_goes_on_to_the_same_data(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "whole.npz") == 0

    def interrupted(plans, workers):
        player = make_player(MAZE)
        yield from (play(player, plan) for plan in plans[:2])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "play_all", interrupted)
        assert run(tmp_path / "stopped.npz") == 130
    assert run(tmp_path / "stopped.npz", "--seed=1") == 2, "those are of other settings"
    assert "holds episodes of other settings" in capsys.readouterr().err
    assert run(tmp_path / "stopped.npz") == 0
    assert "going on after 2 of 4 episodes" in capsys.readouterr().out
    same(tmp_path / "whole.npz", tmp_path / "stopped.npz")
    same(tmp_path / "whole-val.npz", tmp_path / "stopped-val.npz")


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_data(tmp_path):
    assert run(tmp_path / "here.npz") == 0
    assert run(tmp_path / "two.npz", "--workers=2") == 0
    same(tmp_path / "here.npz", tmp_path / "two.npz")


def test_seed_and_number_decide():
    plan = PlayPlan(MAZE, seed=0, number=0, num_steps=20)
    player = make_player(MAZE)
    plans = plan, replace(plan, seed=1), replace(plan, number=1)
    first, *others = (play(player, p).arrays["observations"] for p in plans)
    assert all((other != first).any() for other in others)
    np.testing.assert_array_equal(play(player, plan).arrays["observations"], first)


def test_a_point_reaches_its_goals():
    episode = play(make_player(MAZE), PlayPlan(MAZE, seed=0, number=0, num_steps=1000))
    assert episode.goals == episode.reached >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cube-single-play-v0", "puzzle-3x3-noisy-v0"])
def test_the_oracles_reach_goals_and_an_episode_is_its_plans(dataset):
    """Whatever the environment has played before."""
    player = make_player(dataset)
    plan = PlayPlan(dataset, seed=0, number=1, num_steps=110)
    first = play(player, replace(plan, number=0))
    after, fresh = play(player, plan), play(make_player(dataset), plan)
    for name, array in fresh.arrays.items():
        np.testing.assert_array_equal(array, after.arrays[name], err_msg=name)
    assert first.reached + fresh.reached >= 1
    assert np.abs(fresh.arrays["actions"]).max() <= 1.0
    buttons = "cube" not in dataset
    assert ("button_states" in fresh.arrays) == buttons


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--dataset=antmaze-large-navigate-v0", "ant and humanoid want an expert policy"),
        ("--dataset=cube-twenty-play-v0", "--dataset=cube-twenty-play-v0 is none of OGBench's"),
        ("--episodes=0", "--episodes=0 is too small; it must be at least 1"),
        ("--seed=-1", "--seed=-1 is too small"),
        ("--colour=red", "unrecognized arguments: --colour=red"),
        ("--output=data.hdf5", "--output=data.hdf5 must end in .npz"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_leaves_nothing(flag, sentence, tmp_path, capsys):
    assert run(tmp_path / "d.npz", flag) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(tmp_path, capsys):
    (tmp_path / "d-val.npz").write_bytes(b"precious")
    assert run(tmp_path / "d.npz") == 2
    assert "d-val.npz exists already" in capsys.readouterr().err


def test_a_killed_writer_leaves_no_half_an_episode(tmp_path):
    """Parts have their names only when they are whole."""
    parts = tmp_path / "d.parts"
    parts.mkdir()
    settings = {"dataset": MAZE, "episodes": 3, "steps": 40, "seed": 0}
    (parts / recipe.SETTINGS_NAME).write_text(json.dumps(settings))
    (parts / ".part.000000.npz").write_bytes(b"half")
    assert run(tmp_path / "d.npz") == 0
    assert len(arrays(tmp_path / "d.npz")["terminals"]) == 123


def test_a_scene_whose_cube_is_lost_is_not_kept():
    player = object.__new__(oracles.ArmPlayer)
    player._domain = "scene"
    qpos = np.zeros((3, 25))
    assert player.keeps({"qpos": qpos})
    qpos[1, 15] = 0.29
    assert not player.keeps({"qpos": qpos})
    qpos[1, 15:17] = (-0.31, 0.07)  # in the drawer
    assert player.keeps({"qpos": qpos})
    qpos[1, 16] = 0.02
    assert not player.keeps({"qpos": qpos})

"""Data for OGBench made here: its format, what resuming gives, who plays."""

import json
from dataclasses import replace

import numpy as np
import pytest
from vla_trqam.recipes import make_ogbench_data as recipe

from vla_trqam.data.sources.ogbench import read_shards
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


def test_a_folder_of_files_is_as_ogbenchs_large_sets_and_its_own_loader_reads_each(
    tmp_path, capsys
):
    assert run(tmp_path / "set", "--shards=2", "--episodes=2") == 0
    said = capsys.readouterr().out
    assert said.count("2 episodes of 40 steps") == 2
    names = [f"{MAZE}-00{n}{part}.npz" for n in (0, 1) for part in ("", "-val")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["set", *names])
    task = "pointmaze-medium-navigate-singletask-task1-v0"
    for number in range(2):
        path = tmp_path / f"set/{MAZE}-00{number}.npz"
        env, train, val = ogbench.make_env_and_datasets(task, dataset_path=str(path))
        env.close()
        assert (len(train["observations"]), len(val["observations"])) == (80, 40)
    assert len(read_shards(tmp_path / "set", task).files) == 2
    # Its episodes are those of the seed, one after the other.
    assert run(tmp_path / "one.npz", "--episodes=2") == 0
    same(tmp_path / "one.npz", tmp_path / f"set/{MAZE}-000.npz")
    other = arrays(tmp_path / f"set/{MAZE}-001.npz")["observations"]
    assert (other != arrays(tmp_path / "one.npz")["observations"]).any()


def test_a_stopped_folder_of_files_goes_on_with_the_one_that_was_begun(tmp_path, capsys):
    flags = ("--shards=2", "--episodes=2")
    assert run(tmp_path / "whole", *flags) == 0

    def interrupted(plans, workers):
        for plan in plans:
            if plan.number == 4:  # the second of the second file
                raise KeyboardInterrupt
            yield play(make_player(MAZE), plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "play_all", interrupted)
        assert run(tmp_path / "set", *flags) == 130
    capsys.readouterr()
    assert not (tmp_path / "set").exists()  # which who waits for it would take for whole
    assert run(tmp_path / "set", *flags) == 0
    said = capsys.readouterr().out
    assert f"{MAZE}-000.npz is there already" in said
    assert "going on after 1 of 3 episodes" in said
    assert not (tmp_path / "set.parts").exists()
    for path in sorted((tmp_path / "whole").iterdir()):
        same(path, tmp_path / "set" / path.name)


def test_a_command_killed_as_it_wrote_the_file_goes_on_and_keeps_no_parts(tmp_path):
    assert run(tmp_path / "whole.npz") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.shutil, "rmtree", lambda _: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            run(tmp_path / "d.npz")
    assert run(tmp_path / "d.npz") == 0
    same(tmp_path / "whole.npz", tmp_path / "d.npz")
    assert not (tmp_path / "d.parts").exists()


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


def walked(kind, steps=400):
    player = make_player(f"pointmaze-medium-{kind}-v0")
    return player, play(player, PlayPlan(f"pointmaze-medium-{kind}-v0", 0, 0, steps))


def test_a_point_walks_four_cells_and_stays_there():
    player, episode = walked("stitch")
    inner, (first, *_, last) = player.env.unwrapped, episode.arrays["observations"]
    start = inner.xy_to_ij(first)
    assert start not in (goals := oracles._cells_away(start, set(player._free), 4))
    assert inner.xy_to_ij(inner.cur_goal_xy) in goals
    assert np.linalg.norm(last - inner.cur_goal_xy) < 2.0
    assert (episode.goals, episode.reached) == (1, 1)


def test_a_point_explores_in_directions_of_ten_steps_each():
    _, episode = walked("explore")
    actions = episode.arrays["actions"][:400].reshape(40, 10, 2)
    means = actions.mean(axis=1)
    assert (np.linalg.norm(means, axis=-1) > 0.3).mean() > 0.9, "one direction"
    assert np.linalg.norm(means.mean(axis=0)) < 0.4, "and then another"
    assert (episode.goals, episode.reached) == (0, 0)


def test_goals_are_where_ways_part_turn_or_end():
    """Which a cell between two walls is not."""
    free = {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3)}
    assert [c for c in sorted(free) if not oracles._within_a_hallway(c, free)] == [
        (1, 1),
        (1, 3),
        (3, 3),
    ]
    assert oracles._cells_away((1, 1), free, 4) == [(3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cube-single-play-v0", "puzzle-3x3-noisy-v0", "scene-play-v0"])
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
        ("--dataset=humanoidmaze-medium-navigate-v0", "their data is OGBench's own files"),
        ("--shards=2", "must be a folder, for the 2 files of --shards"),
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
    (tmp_path / "set").mkdir()
    assert run(tmp_path / "set", "--shards=2") == 2
    assert "set exists already" in capsys.readouterr().err


def test_a_command_killed_before_its_parts_were_gone_keeps_the_folder(tmp_path):
    flags = ("--shards=2", "--episodes=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.shutil, "rmtree", lambda _: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            run(tmp_path / "set", *flags)
    made = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert len(made) == 4
    assert run(tmp_path / "set", *flags) == 0
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == made
    assert not (tmp_path / "set.parts").exists()


def test_a_killed_writer_leaves_no_half_an_episode(tmp_path):
    """Parts have their names only when they are whole."""
    parts = tmp_path / "d.parts"
    parts.mkdir()
    settings = {"dataset": MAZE, "episodes": 3, "steps": 40, "seed": 0}  # of before --shards
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

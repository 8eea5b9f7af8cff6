"""OGBench's npz data against OGBench's own loader, on files made here."""

import weakref

import numpy as np
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources import ogbench as source
from vla_trqam.data.sources.base import fill
from vla_trqam.data.sources.ogbench import (
    data_path,
    dataset_name,
    read_ogbench,
)
from vla_trqam.envs.ogbench.family import DOMAINS, task_names
from vla_trqam.errors import UserError

from .source_contract import SourceContract

ogbench = pytest.importorskip("ogbench", reason="uv sync --extra ogbench")
MAZE = "pointmaze-medium-navigate-singletask-task1-v0"
GOAL = np.array([20.0, 20.0])


def maze_rows(seed=0, trajectories=3, steps=30):
    """Points that pass through the goal of task 1, stay, and leave it."""
    rng = np.random.default_rng(seed)
    xy = []
    for number in range(trajectories):
        away = np.abs(np.arange(steps + 1) - 12 - number).clip(min=3) - 3  # at the goal for 7 rows
        noise = 0.05 * rng.normal(size=(steps + 1, 2))
        xy.append(GOAL + 0.3 * away[:, None] * [1.0, 0.0] + noise)
    xy = np.concatenate(xy).astype(np.float32)
    last = np.zeros(len(xy), bool)
    last[steps :: steps + 1] = True
    return {
        "observations": xy,
        "actions": rng.uniform(-1, 1, xy.shape).astype(np.float32),
        "terminals": last,
        "qpos": xy,
        "qvel": np.zeros_like(xy),
    }


def arm_rows(task, seed=0, steps=40):
    """Random states of the arm's task, some of which have the goal's parts."""
    env = ogbench.make_env_and_datasets(task, env_only=True)
    observation, _ = env.reset(seed=seed)
    inner, rng = env.unwrapped, np.random.default_rng(seed)
    qpos = np.repeat(inner._data.qpos[None].copy(), steps + 1, axis=0)
    if task.startswith("scene"):
        for column, goal in ((-2, inner._target_drawer_pos), (-1, inner._target_window_pos)):
            qpos[:, column] = goal + rng.uniform(0, 0.05, steps + 1)
    for cube in range(getattr(inner, "_num_cubes", 0)):
        goal = inner._data.mocap_pos[cube]
        near = rng.uniform(0, 0.06, (steps + 1, 1))
        qpos[:, 14 + 7 * cube : 17 + 7 * cube] = goal + near * np.eye(3)[0]
    rows = {
        "observations": rng.normal(size=(steps + 1, len(observation))).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps + 1, 5)).astype(np.float32),
        "terminals": np.arange(steps + 1) == steps,
        "qpos": qpos.astype(np.float32),
    }
    if hasattr(inner, "_target_button_states"):
        flip = rng.random((steps + 1, inner._num_buttons)) < 0.1
        rows["button_states"] = np.where(flip, 1, 0) ^ inner._target_button_states
    env.close()
    return rows


def saved(folder, name, rows):
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **rows)
    np.savez_compressed(folder / f"{name}-val.npz", **rows)
    return folder / f"{name}.npz"


def loaded(path, task, folder, *, dense=False):
    data = read_ogbench(path, task, dense=dense)
    replay = Replay.create(
        folder,
        observation_dim=data.observation_dim,
        action_dim=data.action_dim,
        capacity=data.num_steps,
    )
    fill(replay, data, "pretrain", say=lambda line: None)
    return data, replay


def steps_of(replay):
    """Every step of the replay: s, s', whether nothing is bootstrapped, whether an episode ends."""
    table, observations, terminated, ends = replay.episodes(), [], [], []
    for i, count in enumerate(table.num_steps):
        rows = table.first_observation[i] + np.arange(count)
        observations.append(np.stack([replay.observations[rows], replay.observations[rows + 1]]))
        final = np.arange(count) == count - 1
        terminated.append(final & table.terminated[i])
        ends.append(final & table.truncated[i])
    before, after = np.concatenate(observations, axis=1)
    return before, after, np.concatenate(terminated), np.concatenate(ends)


@pytest.mark.parametrize(
    "task",
    [
        MAZE,
        pytest.param("cube-single-play-singletask-task2-v0", marks=pytest.mark.slow),
        pytest.param("cube-double-play-singletask-task2-v0", marks=pytest.mark.slow),
        pytest.param("puzzle-3x3-play-singletask-task4-v0", marks=pytest.mark.slow),
        pytest.param("scene-play-singletask-task2-v0", marks=pytest.mark.slow),
    ],
)
def test_every_step_is_ogbenchs_with_its_reward_mask_and_end(task, tmp_path):
    rows = maze_rows() if task == MAZE else arm_rows(task)
    path = saved(tmp_path / "data", dataset_name(task), rows)
    env, theirs, _ = ogbench.make_env_and_datasets(task, dataset_dir=str(path.parent))
    env.close()
    data, replay = loaded(path, task, tmp_path / "replay")
    before, after, terminated, cut = steps_of(replay)
    np.testing.assert_array_equal(before, theirs["observations"])
    np.testing.assert_array_equal(after, theirs["next_observations"])
    np.testing.assert_array_equal(replay.actions, theirs["actions"])
    assert 0 < data.num_solved == (theirs["masks"] == 0).sum() < data.num_steps
    np.testing.assert_array_equal(terminated, theirs["masks"] == 0)
    ours = RewardSpec("success_minus_one").apply(replay.rewards)
    sparse = -(theirs["rewards"] != 0).astype(np.float32)  # theirs, but of cube-double and puzzle
    np.testing.assert_array_equal(ours, sparse)
    if len(np.unique(theirs["rewards"])) == 2:  # of a task of one part
        np.testing.assert_array_equal(ours, theirs["rewards"])
    np.testing.assert_array_equal(cut, (theirs["terminals"] == 1) & ~terminated)
    _, parts = loaded(path, task, tmp_path / "dense", dense=True)
    np.testing.assert_array_equal(RewardSpec("dense").apply(parts.rewards), theirs["rewards"])
    np.testing.assert_array_equal(parts.episodes().success, replay.episodes().success)
    assert ("double" in task or "puzzle" in task or "scene" in task) == (parts.rewards.min() < -1)


def test_the_shards_of_a_folder_are_read_in_order_and_those_for_validation_are_not(tmp_path):
    shards = [maze_rows(seed) for seed in (0, 1)]
    for number, rows in enumerate(shards):
        saved(tmp_path / "data", f"pointmaze-medium-navigate-v0-00{number}", rows)
    data, replay = loaded(tmp_path / "data", MAZE, tmp_path / "replay")
    assert [path.name[-7:] for path in data.files] == ["000.npz", "001.npz"]
    expected = np.concatenate([rows["actions"][~rows["terminals"]] for rows in shards])
    np.testing.assert_array_equal(replay.actions, expected)
    both = np.concatenate([rows["observations"] for rows in shards]).astype(np.float64)
    np.testing.assert_allclose(data.mean, both.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(data.std, both.std(axis=0), rtol=1e-4)
    assert (data.num_trajectories, data.num_steps) == (6, 180)


class TestOGBench(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        for number in range(2):
            saved(tmp_path / "data", f"part-{number}", maze_rows(number))
        return read_ogbench(tmp_path / "data", MAZE)


def test_one_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    for number in range(3):
        saved(tmp_path / "data", f"part-{number}", maze_rows(number))
    read, alive = source.read_rows, []

    def watched(path):
        assert [ref() for ref in alive] == [None] * len(alive)
        rows = read(path)
        alive.append(weakref.ref(rows.observations))
        return rows

    monkeypatch.setattr(source, "read_rows", watched)
    loaded(tmp_path / "data", MAZE, tmp_path / "replay")
    assert len(alive) == 6, "looked through, then loaded"


def test_reading_leaves_the_runs_random_numbers_alone(tmp_path):
    path = saved(tmp_path / "data", dataset_name(MAZE), maze_rows())
    np.random.seed(3)
    loaded(path, MAZE, tmp_path / "replay")
    drawn = np.random.uniform()
    np.random.seed(3)
    assert drawn == np.random.uniform()


def without(name):
    return lambda rows: rows.pop(name)


def put(name, row, value):
    def change(rows):
        rows[name] = rows[name].copy()
        rows[name][row] = value

    return change


def replaced(name, function):
    return lambda rows: rows.update({name: function(rows[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("qpos"), "has no array 'qpos', which OGBench's data has; OGBench relabels"),
        (put("observations", 4, np.nan), "a NaN or infinite number in row 4 of observations"),
        (put("qpos", 2, np.inf), "a NaN or infinite number in row 2 of qpos"),
        (put("actions", 7, 1.5), r"an action outside \[-1, 1\] in row 7"),
        (put("terminals", -1, False), "ends within a trajectory"),
        (put("terminals", 0, True), "has no step in trajectory 0"),
        (replaced("actions", lambda a: a[:-1]), "has 92 rows of actions and 93 of terminals"),
        (replaced("terminals", lambda t: t * 2), "terminals that are not one 0 or 1 a state"),
        (replaced("qpos", lambda q: np.hstack([q, q])), "has qpos of 4 numbers, the task .* of 2"),
        (replaced("observations", lambda o: o.astype(np.uint8)), "observations of uint8"),
        (replaced("actions", lambda a: a.astype(object)), "cannot be read as OGBench's npz"),
    ],
)
def test_a_file_that_is_not_as_ogbenchs_is_refused_by_name(change, message, tmp_path):
    rows = maze_rows()
    change(rows)
    np.savez(tmp_path / "strange.npz", **rows)
    with pytest.raises(UserError, match=rf"strange\.npz .*{message}"):
        read_ogbench(tmp_path / "strange.npz", MAZE)


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"text\.npz cannot be read as OGBench's npz"):
        read_ogbench(tmp_path / "text.npz", MAZE)
    with pytest.raises(UserError, match=r"does not exist; it must be an npz or a folder"):
        read_ogbench(tmp_path / "none.npz", MAZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a folder without an npz"):
        read_ogbench(tmp_path / "empty", MAZE)


def test_zeros_that_unpack_to_more_than_a_file_can_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_trqam.data.sources.ogbench_npz.HARMLESS_IN_ALL", 1000)
    np.savez_compressed(tmp_path / "zeros.npz", observations=np.zeros((1000, 1000)))
    with pytest.raises(UserError, match=r"zeros\.npz of \d+ bytes claims to hold 80001\d\d"):
        read_ogbench(tmp_path / "zeros.npz", MAZE)


def test_without_a_path_the_data_that_ogbench_keeps_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"make_ogbench_data.py --dataset=pointmaze-medium-navi"):
        data_path(None, MAZE)
    own = tmp_path / ".ogbench/data/pointmaze-medium-navigate-v0.npz"
    own.parent.mkdir(parents=True)
    own.touch()
    assert data_path(None, MAZE) == own
    with pytest.raises(UserError, match=r"antmaze-giant-navigate-v0.npz, where .* cannot be made"):
        data_path(None, "antmaze-giant-navigate-singletask-task1-v0")


def test_every_domains_data_has_the_name_that_ogbench_gives_it():
    names = {dataset_name(task) for task in task_names()}
    assert names == {f"{domain}-v0" for domain in DOMAINS}
    assert {name.rsplit("-", 2)[1] for name in names} == {"play", "navigate"}
    assert dataset_name("cube-triple-play-singletask-v0") == "cube-triple-play-v0"

"""Demonstrations of Meta-World: what the dataset says, what resuming gives, who plays."""

import json

import numpy as np
import pytest
from vla_trqam.recipes import make_metaworld_data as recipe

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.lerobot.columns import OBJECT_POSITIONS
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.metaworld.demonstrators import episode_plans, play_all
from vla_trqam.errors import UserError

TASKS = "button-press-v3,faucet-open-v3"
SIZE = 64


@pytest.fixture
def played(monkeypatch):
    """No simulator: an episode that tells its plan; Ctrl-C after as many as the list says."""
    stops = []

    def play(tasks, plans, *, max_steps, workers):
        left = stops.pop() if stops else len(plans)
        for plan in plans[:left]:
            yield told(plan, max_steps)
        if left < len(plans):
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "play_all", play)
    monkeypatch.setattr(recipe, "lerobot_family", family)
    return stops


def told(plan, max_steps):
    success = plan.quality == "better"
    observed = np.arange(max_steps + 1) % plan.every == 0
    observed[-1] = not success
    frames = np.full((observed.sum(), SIZE, SIZE, 3), 10 * plan.number, np.uint8)
    return Episode(
        observations=np.full((max_steps + 1, 4), plan.number, np.float32),
        actions=np.full((max_steps, 4), 0.1, np.float32),
        rewards=np.zeros(max_steps, np.float32),
        terminated=success,
        truncated=not success,
        success=success,
        task=("press", "turn")[plan.number % 2],
        images={"observation.image": frames},
        observed=observed,
        columns={OBJECT_POSITIONS: np.full((max_steps, 9), plan.number, np.float32)},
    )


def family(name, *, task, max_episode_steps):
    assert (name, task) == ("metaworld", TASKS)
    return EnvFamily(
        name=name,
        task=task,
        make=lambda rendering: None,
        max_episode_steps=max_episode_steps,
        control_rate=80,
        task_texts=("press", "turn"),
        action_low=(-1.0,) * 4,
        action_high=(1.0,) * 4,
        state_size=4,
        cameras={"observation.image": (SIZE, SIZE, 3)},
    )


def run(output, *more):
    flags = (f"--tasks={TASKS}", "--episodes=6", "--max_steps=12", "--every=4")
    return recipe.main([*flags, f"--output={output}", *more])


def read(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/metaworld", root=folder)


def test_the_dataset_tells_task_success_and_where_a_frame_is_new(tmp_path, played, capsys):
    assert run(tmp_path / "data") == 0
    assert "6 episodes, 72 steps, success 33%" in capsys.readouterr().out
    dataset = read(tmp_path / "data")
    assert dataset.fps == 80
    rows = dataset.hf_dataset.with_format("numpy")
    episode = np.stack(rows["episode_index"])
    told_at, texts = np.stack(rows["task_index"]), list(dataset.meta.tasks.index)
    assert [texts[told_at[episode == e][0]] for e in range(6)] == ["press", "turn"] * 3
    # The tasks in turn; of each, the qualities in turn: only the first two play well.
    success = np.stack(rows["next.success"]).ravel()
    assert [bool(success[episode == e].any()) for e in range(6)] == [True, True] + [False] * 4
    new = np.stack(rows["frame_is_new"]).ravel()
    assert new[episode == 0].tolist() == [n % 4 == 0 for n in range(12)]
    assert new[episode == 3].tolist() == [n % 4 == 0 for n in range(13)]
    assert not (tmp_path / "data.parts").exists()


def test_stopped_twice_it_goes_on_to_the_same_episodes(tmp_path, played, capsys):
    assert run(tmp_path / "whole") == 0
    played[:] = [1, 3]
    assert run(tmp_path / "cut") == 130
    assert run(tmp_path / "cut") == 130
    assert not (tmp_path / "cut").exists()
    assert run(tmp_path / "cut") == 0
    assert "going on after 4 of 6 episodes" in capsys.readouterr().out
    folders = [tmp_path / name for name in ("whole", "cut")]
    both = [read(folder).hf_dataset.with_format("numpy") for folder in folders]
    for name in ("observation.state", "action", "episode_index", "task_index", "next.done"):
        np.testing.assert_array_equal(*(np.stack(rows[name]) for rows in both), err_msg=name)


def test_episodes_of_other_settings_are_not_gone_on_with(tmp_path, played, capsys):
    played[:] = [2]
    assert run(tmp_path / "data") == 130
    assert run(tmp_path / "data", "--seed=1") == 2
    assert "holds episodes of other settings" in capsys.readouterr().err
    settings = json.loads((tmp_path / "data.parts" / "settings.json").read_text())
    assert settings["seed"] == 0


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--episodes=0", "--episodes=0 must be at least 1"),
        ("--every=0", "--every=0 must be at least 1"),
        ("--workers=-1", "--workers=-1 must not be negative"),
        ("--qualities=better,best", "--qualities: 'best' is not known; there are better, okay"),
        ("--episodes=200000", "--episodes=200000 is more than the 100000"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, played, capsys, flag, said):
    assert run(tmp_path / "data", flag) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(tmp_path, played, capsys):
    (tmp_path / "data").mkdir()
    assert run(tmp_path / "data") == 2
    assert "exists already" in capsys.readouterr().err


def test_in_meta_world_a_better_hand_succeeds_and_processes_change_nothing():
    pytest.importorskip("metaworld", reason="uv sync --extra metaworld")
    tasks = TASKS.split(",")
    plans = episode_plans(0, 4, 2, ("better", "worse"), every=40)
    alone = list(play_all(tasks, plans, max_steps=80, workers=0))
    for one, other in zip(alone, play_all(tasks, plans, max_steps=80, workers=2), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(
            one.columns[OBJECT_POSITIONS], other.columns[OBJECT_POSITIONS]
        )
    assert [episode.success for episode in alone] == [True, True, False, False]
    texts = [episode.task for episode in alone]
    assert texts == ["Press a button", "Rotate the faucet counter-clockwise"] * 2
    for episode in alone:
        assert episode.rewards.sum() == episode.success
        assert len(episode.images["observation.image"]) == episode.where_observed.sum()
        assert episode.columns[OBJECT_POSITIONS].shape == (episode.num_steps, 9)
    with pytest.raises(UserError, match="LeRobot does not make"):
        list(play_all(["fly-v3"], plans, max_steps=80, workers=0))

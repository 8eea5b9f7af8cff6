"""A recipe for LeRobot's policies on two datasets with a reward rule each."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_deaths import dies_at_update
from toy_files import differences, metrics_lines
from toy_images import NUM_DEMOS, images_state
from vla_runs import (
    PI0,
    Files,
    files,
    forgetful_pool,
    killed,
    main,
    no_conclusion,
    resume,
    whole_run,
    without_simulator,
)

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.folder.pins import read_pins
from vla_trqam.errors import UserError
from vla_trqam.jobs import vla
from vla_trqam.jobs.vla_inputs import dataset_configs

__all__ = ["files", "forgetful_pool", "no_conclusion", "without_simulator"]  # fixtures
pytestmark = pytest.mark.slow
KEPT = 4


CHUNKS: dict[str, Any] = {
    "chunk_length": 2,
    "discount": 0.99,
    "short_chunks": "pad",
    "reward": RewardSpec("success_minus_one", {"dataset_2": "column"}),
}


def with_interventions(
    source: Path, root: Path, scratch: Path, rewards: Callable[[np.ndarray], np.ndarray], fps: int
) -> Path:
    """A copy of a dataset with other rewards, in which a person takes over at every third step."""
    reader = LeRobotReader(LeRobotConfig("local/toy", source))
    sizes = replace(reader.sizes, columns={"intervention": ("bool", ())})
    replay = Replay.create(
        scratch,
        observation_dim=sizes.observation_dim,
        action_dim=sizes.action_dim,
        capacity=sizes.num_steps,
        cameras=sizes.cameras,
        columns=sizes.columns,
    )
    for episode in reader.episodes():
        taken = {"intervention": np.arange(episode.num_steps) % 3 == 1}
        changed = replace(episode, rewards=rewards(episode.rewards), columns=taken)
        replay.add(changed, source="demonstrations")
    write_lerobot_dataset(replay, root, repo_id="local/copy", fps=fps)
    replay.close()
    return root


@pytest.fixture(scope="module")
def two(files: Files, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags: demos with 1 at success, and the first of another round's with -1 until success."""
    folder = tmp_path_factory.mktemp("two")
    demos = with_interventions(files.dataset, folder / "demos", folder / "a", np.array, 20)
    costs = with_interventions(files.dataset, folder / "round1", folder / "b", lambda r: r - 1, 20)
    return [
        *files.flags(),
        *("--steps=1", "--online.steps=2", "--critic.warmup_steps=1", "--evaluate_every=0"),
        *("--critic.updates_per_step=1", "--base_episodes=1", "--online.episodes_per_round=1"),
        "--online.fraction=0.5",  # of the critic's own batches too
        f"--dataset.root={demos}",
        f"--dataset.more=[{{repo_id: local/round1, root: {costs}, kind: column, "
        f"episodes: {list(range(KEPT))}}}]",
    ]


@pytest.fixture(scope="module")
def whole(two: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", two, concluded=False).folder


def test_the_replay_holds_both_with_their_rewards_and_interventions(whole: Path) -> None:
    replay = Replay.open(whole / "replay")
    episodes = replay.episodes()
    sources = {name: stats.episodes for name, stats in replay.stats.by_source.items()}
    assert sources == {"dataset": NUM_DEMOS, "dataset_2": KEPT, "critic": 1, "online": 1}
    of_steps = np.repeat(episodes.source, episodes.num_steps)
    assert set(replay.rewards[of_steps == "dataset"]) == {0.0, 1.0}
    assert set(replay.rewards[of_steps == "dataset_2"]) <= {-1.0, 0.0}
    first = slice(0, KEPT)
    lengths = episodes.num_steps[first]
    assert episodes.num_steps[NUM_DEMOS : NUM_DEMOS + KEPT].tolist() == lengths.tolist()
    begun, kept = (of_steps == "dataset").sum(), int(lengths.sum())
    assert np.array_equal(replay.rewards[begun : begun + kept], replay.rewards[:kept] - 1)
    expected = np.concatenate([np.arange(length) % 3 == 1 for length in lengths])
    assert np.array_equal(replay.column("intervention")[:kept], expected)
    assert np.array_equal(replay.column("intervention")[begun : begun + kept], expected)
    assert not replay.column("intervention")[np.isin(of_steps, ["critic", "online"])].any()


def test_what_each_dataset_is_read_by_is_printed_and_pinned(
    two: list[str], no_conclusion: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--critic.warmup_steps=0", "--base_episodes=0", "--online.steps=0", "--steps=1"]
    weight = "--dataset.intervention_weight=3"
    assert main(*two, *flags, weight, "--env.type=null", f"--output_dir={tmp_path / 'run'}") == 0
    said = capsys.readouterr().out
    replay = Replay.open(tmp_path / "run/replay")
    often = replay.sampler(**CHUNKS, repeats={"intervention": 3}).num_starts
    once = replay.sampler(**CHUNKS).num_starts
    assert often > once
    assert f"{once} to draw, which count as {often}" in said
    replay.close()
    assert f"dataset: {NUM_DEMOS} episodes, " in said
    assert f"dataset_2: {KEPT} episodes, " in said
    assert "dataset_2: reward: the column next.reward" in said
    assert "dataset_2: further columns: intervention" in said
    assert "outliers of dataset_2" in said
    assert "statistics of dataset_2" in said
    assert "success_minus_one (dataset_2: column): -1 to 0" in said
    assert list(read_pins(tmp_path / "run")) == ["policy", "dataset", "dataset_2"]


def test_a_killed_run_on_two_datasets_goes_on_to_the_same_bits(
    two: list[str], whole: Path, tmp_path: Path, no_conclusion: None
) -> None:
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        main(*two, f"--output_dir={tmp_path / 'run'}")
    assert resume(tmp_path / "run") == 0
    assert differences(images_state(tmp_path / "run"), images_state(whole)) == []
    columns = [Replay.open(f / "replay").column("intervention") for f in (whole, tmp_path / "run")]
    assert np.array_equal(*columns)


def test_a_run_does_not_go_on_with_another_second_dataset(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--critic.warmup_steps=1", "--base_episodes=0", "--online.steps=0", "--steps=2"]
    with killed(lambda patch: dies_at_update(patch, Cached, 2)):
        main(*two, *flags, "--env.type=null", f"--output_dir={tmp_path / 'run'}")
    inputs = tmp_path / "run/inputs.json"
    pins = json.loads(inputs.read_text())
    name = next(name for name in pins["dataset_2"]["files"] if name.startswith("data"))
    pins["dataset_2"]["files"][name] |= {"digest": "other", "mtime_ns": 0}
    inputs.write_text(json.dumps(pins))
    assert resume(tmp_path / "run") == 2
    assert f"{name} (dataset_2) is not the one that the run in" in capsys.readouterr().err


def test_a_second_dataset_of_another_rate_is_refused_before_a_folder_is_made(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_interventions(files.dataset, tmp_path / "slow", tmp_path / "a", np.array, 10)
    flags = [*files.flags(), f"--dataset.more=[{{repo_id: local/slow, root: {other}}}]"]
    assert main(*flags, f"--output_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert f"The dataset {files.dataset} and the dataset {other} cannot be learned from" in said
    assert "frames per second are 20 in the first and 10 in the second" in said
    assert not (tmp_path / "run").exists()
    assert main(*files.flags(), "--dataset.more=[{root: x}]") == 2
    assert "--dataset.more[0] names no repo_id" in capsys.readouterr().err
    assert main(*files.flags(), "--dataset.columns=[speed]") == 2
    assert "has no further column of numbers 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("", "--rename_map (of --dataset.more[0] too, unless it has its own: rename_map: {} is "),
        (", rename_map: {agentview: top}", "rename_map of --dataset.more[0] names agentview; "),
    ],
)
def test_a_further_datasets_cameras_have_names_of_their_own(
    own: str, said: str, files: Files, tmp_path: Path
) -> None:
    """The first one's camera is called otherwise, so the map of it does not fit the second."""
    first = renamed(files.dataset, tmp_path / "first")
    names = "{observation.images.front: observation.images.agentview}"
    more = f"repo_id: local/toy, root: {files.dataset}"
    flags = [*files.flags(), f"--dataset.root={first}", f"--rename_map={names}"]

    def opened(own: str) -> LeRobotDatasets:
        config = vla.read_config(PI0, None, [*flags, f"--dataset.more=[{{{more}{own}}}]"])
        return LeRobotDatasets.opened(dataset_configs(config, None))

    with pytest.raises(UserError, match=re.escape(said)):
        opened(own)
    for reader in opened(", rename_map: {}").named.values():
        assert [*reader.cameras] == ["agentview"]


def renamed(dataset: Path, root: Path) -> Path:
    """A copy whose camera is called front."""
    shutil.copytree(dataset, root)
    for path in root.rglob("*.json*"):
        path.write_text(path.read_text().replace("images.agentview", "images.front"))
    for path in root.rglob("*.parquet"):
        table = pq.read_table(path)
        names = [name.replace("images.agentview", "images.front") for name in table.column_names]
        pq.write_table(table.rename_columns(names), path)
    return root


def test_interventions_are_cloned_where_all_datasets_tell_of_them(
    two: list[str],
    files: Files,
    no_conclusion: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--critic.warmup_steps=0", "--base_episodes=0", "--online.steps=0", "--steps=1"]
    flags += ["--env.type=null", "--method.clone_interventions=0.5", "--batch_size=16"]
    assert main(*two, *flags, "--log_freq=1", f"--output_dir={tmp_path / 'run'}") == 0
    (line,) = metrics_lines(tmp_path / "run")
    assert line["intervention_loss"] > 0
    capsys.readouterr()
    assert main(*files.flags(), *flags, f"--output_dir={tmp_path / 'none'}") == 2
    assert "needs a column that tells which actions a person took" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

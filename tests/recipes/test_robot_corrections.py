"""A round in which a person took over: LeRobot's DAgger corrections beside plain episodes."""

from pathlib import Path

import numpy as np
import pytest
from robot_sessions import labels_of, record_corrections, record_episodes
from toy_files import metrics_lines
from toy_images import write_toy_policy
from vla_runs import main

from vla_trqam.data.replay import Replay

pytestmark = pytest.mark.slow
EPISODES, CORRECTIONS = 4, 5
TUNING = [
    *("--env.type=null", "--online.steps=0", "--base_episodes=0", "--evaluate_every=0"),
    *("--peft.r=4", "--batch_size=8", "--steps=40", "--critic.warmup_steps=2", "--log_freq=10"),
    *("--critic.batch_size=8", "--critic.hidden_dims=[8]", "--critic.ensemble_size=2"),
    *("--method.actor_lr=3e-3", "--policy.tuned_flow_steps=null", "--num_threads=1"),
    *("--eval.videos=0", "--dataset.reward=success"),
]


@pytest.fixture(scope="module")
def round_one(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that tune on a round of both."""
    folder = tmp_path_factory.mktemp("round")
    policy = write_toy_policy(folder / "policy")
    played, corrected = folder / "played", folder / "corrected"
    with pytest.MonkeyPatch.context() as patch:
        record_episodes(policy, played, 0, EPISODES, patch)
        record_corrections(policy, corrected, 100, CORRECTIONS, patch)
    return [
        *(f"--policy.path={policy}", "--dataset.repo_id=me/played", f"--dataset.root={played}"),
        f"--dataset.success_labels={labels_of(played)}",
        f"--dataset.more=[{{repo_id: me/corrected, root: {corrected}, reward: success, "
        f"success_labels: {labels_of(corrected)}}}]",
        *TUNING,
    ]


def test_corrections_are_cloned_beside_episodes_that_have_none(
    round_one: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(*round_one, "--method.clone_interventions=3", f"--output_dir={run}") == 0
    said = capsys.readouterr().out
    assert "dataset: no column intervention: zeros, nobody intervened" in said
    assert "dataset_2: further columns: intervention" in said
    assert f"dataset_2: {CORRECTIONS} episodes, {CORRECTIONS} successful" in said
    replay = Replay.open(run / "replay")
    episodes = replay.episodes()
    of_steps = np.repeat(episodes.source, episodes.num_steps)
    taken = replay.column("intervention")
    assert taken[of_steps == "dataset_2"].all()
    assert not taken[of_steps == "dataset"].any()
    lines = [line for line in metrics_lines(run) if line["phase"] == "offline"]
    losses = [line["intervention_loss"] for line in lines if "intervention_loss" in line]
    assert losses[-1] < losses[0]


def test_a_round_without_corrections_has_none_to_clone(
    round_one: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [flag for flag in round_one if not flag.startswith("--dataset.more=")]
    run = tmp_path / "run"
    assert main(*alone, "--method.clone_interventions=3", f"--output_dir={run}") == 2
    assert "needs a column that tells which actions a person took" in capsys.readouterr().err
    assert not run.exists()

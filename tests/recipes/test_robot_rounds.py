"""Rounds as one does on a robot: record with LeRobot, label, tune on all rounds, record again.

docs/robot_rounds.md in little: the robot is simulated and a person labels, all else is what a user
has, LeRobot's own ``lerobot-rollout`` among it.
"""

from pathlib import Path

import pytest
from robot_sessions import labels_of, record_episodes
from toy_images import write_toy_policy
from vla_runs import main

pytestmark = pytest.mark.long

EPISODES, ROUNDS = 40, 3
TUNING = [
    *("--env.type=null", "--online.steps=0", "--base_episodes=0", "--evaluate_every=0"),
    *("--peft.method=lora", "--peft.r=8", "--policy.merged=false"),
    *("--batch_size=32", "--steps=300", "--critic.warmup_steps=600"),
    *("--critic.batch_size=64", "--critic.hidden_dims=[64,64]", "--critic.ensemble_size=4"),
    *("--critic.updates_per_step=3", "--method.actor_lr=2e-3", "--method.critic_lr=1e-3"),
    *("--method.kl_budget=1", "--policy.tuned_flow_steps=null", "--save_freq=1000"),
    *("--num_threads=1", "--eval.videos=0", "--dataset.reward=success"),
]


def tune(base: Path, last: Path | None, rounds: list[Path], run: Path) -> Path:
    """On all rounds so far, from the last checkpoint on; the new one."""
    first, *more = rounds
    flags = [f"--policy.path={last or base}", f"--dataset.root={first}", *TUNING]
    flags += ["--dataset.repo_id=me/round_0", f"--dataset.success_labels={labels_of(first)}"]
    if more:
        told = ", ".join(
            f"{{repo_id: me/round_{n}, root: {root}, reward: success, "
            f"success_labels: {labels_of(root)}}}"
            for n, root in enumerate(more, 1)
        )
        flags.append(f"--dataset.more=[{told}]")
    if last is not None:
        flags += ["--policy.adapter=continue", f"--critic.path={last.parent}"]
    assert main(*flags, f"--output_dir={run}") == 0
    return (run / "checkpoints/last").resolve() / "pretrained_model"


def test_success_rises_from_round_to_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base, last = write_toy_policy(tmp_path / "policy"), None
    solved, rounds = [], []
    for number in range(ROUNDS):
        root = tmp_path / f"rollout_{number}"
        solved.append(record_episodes(last or base, root, 1000 * number, EPISODES, monkeypatch))
        rounds.append(root)
        last = tune(base, last, rounds, tmp_path / f"run_{number}")
    end = tmp_path / "rollout_end"
    solved.append(record_episodes(last or base, end, 0, EPISODES, monkeypatch))
    counts = [sum(labels) for labels in solved]
    said = capfd.readouterr().out
    with capfd.disabled():
        print("solved", counts, "of", EPISODES)
    assert f"dataset_3: {EPISODES} episodes, {counts[2]} successful" in said
    # The first and the last round have the same initial states.
    assert counts[-1] >= counts[0] + EPISODES // 4, counts

"""The task of docs/add_a_task.md, its recorded data and its command: a tiny π0 is tuned on them."""

import json
import sys
from pathlib import Path

import pytest
from vla_trqam.adapters.tiny.checkpoints import (
    flow_features,
    tiny_pi0_config,
    unit_stats,
    write_checkpoint,
)
from vla_trqam.recipes import finetune_pi0

from vla_trqam.data.replay import Replay
from vla_trqam.jobs import vla

sys.path.append(str(Path(__file__).parents[1] / "envs"))
from docs_task import CAR, DATA, registered

pytest.importorskip("pygame", reason="gymnasium draws with it: uv sync --extra pusht")
pytestmark = pytest.mark.long
EPISODES = 3
FLAGS = (
    *("--env.type=mountain_car", "--eval.max_episode_steps=120", "--eval.num_workers=1"),
    *("--steps=2", "--online.steps=2", "--base_episodes=1", "--online.episodes_per_round=1"),
    *("--online.updates_per_round=2", "--evaluate_every=0", "--eval.episodes=2"),
    *("--eval.episodes_during_training=1", "--eval.videos=0", "--batch_size=2", "--log_freq=1"),
    *("--critic.warmup_steps=2", "--critic.updates_per_step=1", "--critic.batch_size=2"),
    *("--critic.next_actions=1", "--critic.hidden_dims=[8]", "--peft.r=2", "--save_freq=2"),
    "--num_threads=1",
)


def write_policy(folder: Path, chunk: int) -> Path:
    """With random weights."""
    features = flow_features(2, 1, (CAR.CAMERA,), CAR.SIZE)
    sizes = {"max_state_dim": 4, "max_action_dim": 3, "head_dim": 8, "num_inference_steps": 2}
    sizes["tokenizer_max_length"] = 64  # the instruction, a byte a token
    widths = dict.fromkeys(
        [f"{part}_{kind}" for part in ("vlm", "expert", "vision") for kind in ("width", "mlp_dim")],
        16,
    )
    config = tiny_pi0_config(features, chunk_size=chunk, n_action_steps=chunk, **sizes, **widths)
    return write_checkpoint(config, unit_stats(features), folder)


def test_a_tiny_pi0_is_tuned_with_rollouts_in_the_pages_task(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    exec(DATA, page := {"__name__": __name__})
    with registered():
        page["record"](data, tmp_path / "scratch", EPISODES)
        flags = [
            f"--policy.path={write_policy(tmp_path / 'policy', page['CHUNK'])}",
            "--dataset.repo_id=local/mountain_car",
            f"--dataset.root={data}",
            f"--output_dir={run}",
            *FLAGS,
        ]
        assert vla.main(Path(finetune_pi0.__file__), None, flags) == 0
    replay = Replay.open(run / "replay")
    recorded = replay.episodes()
    # Recorded: one without an idea, then two that roll; then the policy's, before and in training.
    assert [bool(success) for success in recorded.success[:EPISODES]] == [False, True, True]
    assert replay.num_episodes == EPISODES + 2
    assert replay.task_of_episodes() == [CAR.TEXT] * (EPISODES + 2)
    assert replay.cameras == {CAR.CAMERA: (CAR.SIZE, CAR.SIZE, 3)}
    replay.close()
    assert len(json.loads((run / "evaluation.json").read_text())["tuned_steps"]) == 2

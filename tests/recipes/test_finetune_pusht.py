"""A tiny π0 with rollouts in LeRobot's PushT, from a dataset of that environment."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vla_trqam.adapters.tiny.checkpoints import (
    flow_features,
    tiny_pi0_config,
    unit_stats,
    write_checkpoint,
)
from vla_trqam.recipes import finetune_pi0

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.envs.lerobot.family import lerobot_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.jobs import vla

pytest.importorskip("gym_pusht", reason="uv sync --extra pusht")
pytestmark = pytest.mark.long
CHUNK, STEPS, CAMERA = 4, 12, "observation.image"
TEXT = "Push the T-shaped block onto the T-shaped target."
FLAGS = (
    *("--env.type=pusht", f"--eval.max_episode_steps={STEPS}", "--eval.num_workers=1"),
    *("--steps=2", "--online.steps=2", "--base_episodes=1", "--online.episodes_per_round=1"),
    *("--online.updates_per_round=2", "--evaluate_every=0", "--eval.episodes=2"),
    *("--eval.episodes_during_training=1", "--eval.videos=0", "--batch_size=2", "--log_freq=1"),
    *("--critic.warmup_steps=2", "--critic.updates_per_step=1", "--critic.batch_size=2"),
    *("--critic.next_actions=1", "--critic.hidden_dims=[8]", "--peft.r=2", "--save_freq=2"),
    "--num_threads=1",
)


def write_dataset(root: Path, scratch: Path) -> Path:
    """Two episodes of random pushes, one of which shall count as a success."""

    def wander(seen, seeds, numbers):
        drawn = np.random.default_rng((int(seeds[0]), int(numbers[0])))
        return drawn.uniform(50, 450, (1, CHUNK, 2)).astype(np.float32)

    family = lerobot_family("pusht", max_episode_steps=STEPS)
    replay = Replay.create(
        scratch, observation_dim=2, action_dim=2, cameras=dict(family.cameras), capacity=2 * STEPS
    )
    with RolloutPool(family, chunk_length=CHUNK, num_workers=1) as pool:
        failure, other = pool.run(wander, [1, 2])
    replay.add(failure, source="dataset")
    replay.add(as_success(other), source="dataset")
    write_lerobot_dataset(replay, root, repo_id="local/pusht", fps=10)
    replay.close()
    return root


def as_success(episode: Episode) -> Episode:
    """The same, ended by its last step."""
    rewards = episode.rewards.copy()
    rewards[-1] = 1
    observed = episode.where_observed.copy()
    observed[-1] = False
    ended = replace(episode, rewards=rewards, terminated=True, truncated=False, success=True)
    seen = {name: images[:-1] for name, images in episode.images.items()}
    return replace(ended, images=seen, observed=observed)


def write_policy(folder: Path) -> Path:
    """With random weights; what it sees and does is about the middle of the table."""
    features = flow_features(2, 2, (), 96)
    image = flow_features(2, 2, ("top",), 96)["input_features"]["observation.images.top"]
    features["input_features"][CAMERA] = image
    sizes = {"max_state_dim": 4, "max_action_dim": 3, "head_dim": 8, "num_inference_steps": 2}
    sizes["tokenizer_max_length"] = 64  # the instruction, a byte a token
    widths = dict.fromkeys(
        [f"{part}_{kind}" for part in ("vlm", "expert", "vision") for kind in ("width", "mlp_dim")],
        16,
    )
    config = tiny_pi0_config(features, chunk_size=CHUNK, n_action_steps=CHUNK, **sizes, **widths)
    stats = unit_stats(features)
    table = {"mean": 256.0, "std": 100.0, "min": 0.0, "max": 512.0, "q01": 0.0, "q99": 512.0}
    for key in ("action", "observation.state"):
        stats[key] = {name: torch.full((2,), value) for name, value in table.items()}
    return write_checkpoint(config, stats, folder)


def test_a_tiny_pi0_is_tuned_with_rollouts_in_pusht(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", tmp_path / "scratch")
    policy = write_policy(tmp_path / "policy")
    run = tmp_path / "run"
    given = [
        f"--policy.path={policy}",
        "--dataset.repo_id=local/pusht",
        f"--dataset.root={dataset}",
    ]
    arguments = [*given, *FLAGS, f"--output_dir={run}"]
    assert vla.main(Path(finetune_pi0.__file__), None, arguments) == 0
    replay = Replay.open(run / "replay")
    assert replay.task_of_episodes() == [TEXT] * 4  # two demonstrations, base and online rollout
    assert replay.cameras == {CAMERA: (96, 96, 3)}
    actions = replay.actions[2 * STEPS :]
    assert actions.min() >= 0
    assert actions.max() <= 512
    assert np.ptp(actions) > 50
    replay.close()
    assert json.loads((run / "evaluation.json").read_text())["tuned_steps"] == [STEPS] * 2

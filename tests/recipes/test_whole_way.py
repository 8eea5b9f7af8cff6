"""From a stock ``lerobot-train`` LoRA checkpoint to stock ``lerobot-eval``, on four tasks.

All commands are a user's, in processes of their own, and all of what a large policy needs at once:
no prefix is kept, frames stay in the datasets, the first actions of a chunk are executed, and there
are two datasets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vla_trqam.adapters.tiny.checkpoints as tiny

from vla_trqam.data.replay import Replay

pytestmark = pytest.mark.long
pytest.importorskip("metaworld", reason="MetaWorld not installed")

TASKS = "button-press-v3,faucet-open-v3,faucet-close-v3,door-unlock-v3"
CHUNK, EXECUTED, MAX_STEPS = 8, 4, 60
EPISODES = 8


def run(*command: str) -> str:
    """What a command printed; it must succeed."""
    told = {"MUJOCO_GL": "egl", **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=told, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def recipe(name: str, *flags: str) -> str:
    return run(sys.executable, "-m", f"vla_trqam.recipes.{name}", *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole_way")


@pytest.fixture(scope="module")
def datasets(folder: Path) -> tuple[Path, Path]:
    """Better and worse demonstrations, two of a task in each."""
    made = folder / "better", folder / "worse"
    for number, root in enumerate(made):
        recipe(
            "make_metaworld_data",
            *(f"--tasks={TASKS}", f"--episodes={EPISODES}", f"--every={EXECUTED}"),
            *(f"--qualities={root.name}", f"--seed={number}", f"--max_steps={MAX_STEPS}"),
            *("--workers=2", f"--output={root}"),
        )
    return made


@pytest.fixture(scope="module")
def adapter(folder: Path, datasets: tuple[Path, Path]) -> Path:
    """Stock LoRA over a stock SmolVLA of small widths and random weights."""
    features = tiny.flow_features(4, 4, ("observation.image",), 480)
    backbone = folder / "smolvlm"
    config = tiny.tiny_smolvla_config(features, backbone, chunk_size=CHUNK, n_action_steps=CHUNK)
    base = tiny.write_checkpoint(config, tiny.unit_stats(features), folder / "base")
    run(
        script("lerobot-train"),
        *(f"--policy.path={base}", "--policy.push_to_hub=false", "--policy.device=cpu"),
        *("--dataset.repo_id=me/better", f"--dataset.root={datasets[0]}"),
        *("--peft.method_type=LORA", "--peft.r=4", "--steps=2", "--batch_size=2"),
        *("--num_workers=0", "--save_freq=2", f"--output_dir={folder / 'lora'}"),
    )
    return folder / "lora/checkpoints/last/pretrained_model"


def test_a_lora_checkpoint_is_tuned_on_two_datasets_and_four_tasks_and_evaluated_by_lerobot(
    folder: Path, datasets: tuple[Path, Path], adapter: Path
) -> None:
    tuned = folder / "run"
    better, worse = datasets
    said = recipe(
        "finetune_smolvla",
        *(f"--policy.path={adapter}", f"--policy.n_action_steps={EXECUTED}"),
        *("--dataset.repo_id=me/better", f"--dataset.root={better}", "--replay.frames=dataset"),
        f"--dataset.more=[{{repo_id: me/worse, root: {worse}}}]",
        *("--prefix_cache=none", "--env.type=metaworld", f"--env.task={TASKS}"),
        *("--steps=2", "--batch_size=2", "--evaluate_every=0", "--base_episodes=2"),
        *("--critic.hidden_dims=[8]", "--critic.ensemble_size=2", "--critic.warmup_steps=2"),
        *("--critic.batch_size=4", "--critic.updates_per_step=1", "--save_freq=2"),
        *("--online.steps=2", "--online.episodes_per_round=2", "--online.updates_per_round=2"),
        *(f"--eval.max_episode_steps={MAX_STEPS}", "--eval.episodes=4", "--eval.videos=0"),
        *("--eval.num_workers=1", "--num_threads=1", f"--output_dir={tuned}"),
    )
    for task in TASKS.split(","):
        assert task in (tuned / "report.md").read_text()
    sources = {
        n: stats.episodes for n, stats in Replay.open(tuned / "replay").stats.by_source.items()
    }
    assert (sources["dataset"], sources["dataset_2"]) == (EPISODES, EPISODES)
    assert "dataset_2: " in said
    run(
        script("lerobot-eval"),
        f"--policy.path={tuned / 'checkpoints/last/pretrained_model'}",
        *("--env.type=metaworld", f"--env.task={TASKS.partition(',')[0]}"),
        *("--eval.n_episodes=1", "--eval.batch_size=1"),  # 500 steps, a picture of each
        f"--output_dir={folder / 'lerobot_eval'}",
    )
    assert (folder / "lerobot_eval/eval_info.json").is_file()

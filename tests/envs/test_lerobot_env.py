"""Stock `lerobot-eval` on Robomimic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

CAMERA, IMAGE_SIZE = "agentview", 32


def tiny_adapter(folder: Path) -> Path:
    """A checkpoint of LoRA adapters alone, over a random tiny_pi0 beside it."""
    from vla_trqam.adapters.loading import load_policy
    from vla_trqam.adapters.lora import LoRASettings
    from vla_trqam.adapters.tiny.checkpoints import (
        flow_features,
        tiny_pi0_config,
        unit_stats,
        write_checkpoint,
    )

    features = flow_features(9, 7, (CAMERA,), IMAGE_SIZE)
    config = tiny_pi0_config(features, num_inference_steps=2)
    base = write_checkpoint(config, unit_stats(features), folder / "base")
    load_policy(base, lora=LoRASettings(r=2)).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.long
def test_stock_lerobot_eval_runs_an_adapter_of_a_tiny_policy_on_robomimic(tmp_path: Path) -> None:
    flags = {
        "policy.path": tiny_adapter(tmp_path),
        "policy.device": "cpu",
        "env.type": "robomimic",
        "env.task": "Lift",
        "env.cameras": f"[{CAMERA}]",
        "env.image_size": IMAGE_SIZE,
        "env.episode_length": 9,
        "env.render_every": 8,
        "eval.n_episodes": 2,
        "eval.batch_size": 2,
        "eval.use_async_envs": "false",
        "output_dir": tmp_path / "out",
    }
    command = Path(sys.executable).with_name("lerobot-eval")
    done = subprocess.run(
        [command, *(f"--{name}={value}" for name, value in flags.items())],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    overall = json.loads((tmp_path / "out" / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2
    assert 0 <= overall["pc_success"] <= 100
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 2


def test_lerobots_environment_is_ours_and_waits_at_its_end() -> None:
    from lerobot.envs.factory import make_env
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features

    from vla_trqam.envs.robomimic.env_meta import env_meta_for
    from vla_trqam.envs.robomimic.images import RobomimicImageEnv
    from vla_trqam.envs.robomimic.lerobot_env import RobomimicEnvConfig

    config = RobomimicEnvConfig(
        cameras=["agentview"], image_size=32, episode_length=4, shadows=False
    )
    shapes = {key: feature.shape for key, feature in env_to_policy_features(config).items()}
    assert shapes == {
        "action": (7,),
        "observation.state": (9,),
        "observation.images.agentview": (3, 32, 32),
    }
    vector = make_env(config, n_envs=1)["robomimic"][0]
    ours = RobomimicImageEnv(
        env_meta_for("Lift"),
        max_episode_steps=4,
        cameras=["agentview"],
        image_size=32,
        shadows=False,
    )
    seen, _ = vector.reset(seed=[5], options={NEW_ROLLOUT_OPTION: True})
    expected, _ = ours.reset(seed=5)
    for t in range(4):
        np.testing.assert_array_equal(seen["agent_pos"][0], expected["agent_pos"])
        np.testing.assert_array_equal(
            seen["pixels"]["agentview"][0], expected["pixels"]["agentview"]
        )
        action = np.full((1, 7), 0.3, np.float32)
        seen, _, _, truncated, info = vector.step(action)
        expected, *_ = ours.step(action[0])
        assert truncated[0] == (t == 3)
    assert not info["is_success"][0]
    again, *_ = vector.step(np.ones((1, 7), np.float32))
    np.testing.assert_array_equal(again["agent_pos"], seen["agent_pos"])
    assert vector.call("task_description") == ("lift the cube",)
    vector.close()
    ours.close()


def test_unknown_task_is_refused_with_a_sentence() -> None:
    from vla_trqam.envs.robomimic.lerobot_env import RobomimicEnvConfig
    from vla_trqam.errors import UserError

    with pytest.raises(UserError, match=r"--env.task is 'Lfit'; choose one of Lift, PickPlaceCan"):
        RobomimicEnvConfig(task="Lfit")

"""Stock `lerobot-eval` on Robomimic; in one process, because imports cost most of the time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = "lerobot_env_robomimic"
pytestmark = pytest.mark.slow
pytest.importorskip("datasets", reason="lerobot-eval needs the extra lerobot[dataset]")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as pip leaves it: importable, with the metadata of a distribution of its name."""
    metadata = tmp_path / "site" / f"{PLUGIN}-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(metadata.parents[1]))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sys.modules.pop(PLUGIN, None)


def test_stock_lerobot_eval_finds_and_evaluates_robomimic(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.scripts import lerobot_eval
    from vla_trqam.adapters.tiny.checkpoints import (
        flow_features,
        tiny_smolvla_config,
        unit_stats,
        write_checkpoint,
    )

    features = flow_features(9, 7, ("agentview",), 32)
    config = tiny_smolvla_config(features, tmp_path / "vlm")
    policy = write_checkpoint(config, unit_stats(features), tmp_path / "policy")
    flags = {
        "policy.path": policy,
        "policy.device": "cpu",
        "env.type": "robomimic",
        "env.task": "Lift",
        "env.cameras": "[agentview]",
        "env.image_size": 32,
        "env.episode_length": 9,
        "env.render_every": 8,
        "eval.n_episodes": 2,
        "eval.batch_size": 2,
        "eval.use_async_envs": "false",
        "output_dir": tmp_path / "out",
    }
    monkeypatch.setattr(sys, "argv", ["eval", *(f"--{k}={v}" for k, v in flags.items())])
    lerobot_eval.main()
    assert PLUGIN in sys.modules
    overall = json.loads((tmp_path / "out" / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2
    assert 0 <= overall["pc_success"] <= 100
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 2


def test_lerobots_environment_is_ours_and_waits_at_its_end() -> None:
    from lerobot.envs.factory import make_env
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features

    from vla_trqam.envs.env_meta import env_meta_for
    from vla_trqam.envs.lerobot_env import RobomimicEnvConfig
    from vla_trqam.envs.robomimic_images import RobomimicImageEnv

    config = RobomimicEnvConfig(cameras=["agentview"], image_size=32, episode_length=4)
    shapes = {key: feature.shape for key, feature in env_to_policy_features(config).items()}
    assert shapes == {
        "action": (7,),
        "observation.state": (9,),
        "observation.images.agentview": (3, 32, 32),
    }
    vector = make_env(config, n_envs=1)["robomimic"][0]
    ours = RobomimicImageEnv(
        env_meta_for("Lift"), max_episode_steps=4, cameras=["agentview"], image_size=32
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
    from vla_trqam.envs.lerobot_env import RobomimicEnvConfig
    from vla_trqam.errors import UserError

    with pytest.raises(UserError, match=r"--env.task is 'Lfit'; choose one of Lift, PickPlaceCan"):
        RobomimicEnvConfig(task="Lfit")


def test_the_distributions_name_is_one_that_lerobot_looks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / PLUGIN / "pyproject.toml").read_text())["project"]
    assert project["name"] == PLUGIN  # compared as written: a dash would hide it

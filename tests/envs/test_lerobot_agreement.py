"""LeRobot's own evaluation loop and ours play the same episode, given the same noise."""

from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

SEED, STEPS, NOISE_SEED = 10000, 20, 2


@pytest.mark.long
def test_lerobots_loop_plays_the_episode_of_our_rollouts() -> None:
    from vla_trqam.adapters.loading import load_policy
    from vla_trqam.recipes.finetune_pi0 import PACKED

    from vla_trqam.engine.acting import chunk_policy
    from vla_trqam.envs.robomimic.env_meta import env_meta_for
    from vla_trqam.envs.robomimic.family import robomimic_family
    from vla_trqam.envs.robomimic.images import STATE_KEYS, CameraSettings
    from vla_trqam.envs.rollout import RolloutPool
    from vla_trqam.methods.base import FlowActor

    policy = load_policy(PACKED / "policy")
    family = robomimic_family(
        env_meta_for("Lift"),
        max_episode_steps=STEPS,
        obs_keys=STATE_KEYS,
        cameras=CameraSettings(("agentview",), 96, False),
    )
    with RolloutPool(family, chunk_length=policy.chunk_shape[0], num_workers=1) as pool:
        (ours,) = pool.run(chunk_policy(policy, FlowActor(policy), NOISE_SEED), [SEED])
    theirs = lerobots_actions(PACKED / "policy", policy.chunk_shape)
    # Before the first contact nothing magnifies the rounding of the two ways to add up Euler steps.
    # What lies beyond the robot's limits is cut by the environment there, and before it here.
    executed = np.clip(theirs, -1, 1)
    np.testing.assert_allclose(executed[: len(ours.actions)], ours.actions, atol=1e-4)
    assert np.ptp(ours.actions[:, :3]) > 0.1, "the arm stood still"


def lerobots_actions(path: Any, chunk_shape: tuple[int, int]) -> np.ndarray:
    """(T, 7): what `lerobot-eval` executes, with the noise of our rollouts for its own."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs.factory import make_env, make_env_pre_post_processors
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.scripts.lerobot_eval import rollout

    from vla_trqam.envs.robomimic.lerobot_env import RobomimicEnvConfig

    config = PreTrainedConfig.from_pretrained(path)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(path, config=config).eval()
    env_config = RobomimicEnvConfig(
        cameras=["agentview"], image_size=96, shadows=False, render_every=8, episode_length=STEPS
    )
    env = make_env(env_config, n_envs=1)["robomimic"][0]
    chunks = iter(range(STEPS))

    def noise(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        generator = np.random.default_rng((NOISE_SEED, SEED, next(chunks)))
        drawn = generator.standard_normal(chunk_shape, dtype=np.float32)
        return torch.from_numpy(drawn).expand(shape).to(device)

    policy.model.sample_noise = noise
    try:
        played = rollout(
            env,
            policy,
            *make_env_pre_post_processors(env_config, config),
            *make_pre_post_processors(config, pretrained_path=str(path)),
            seeds=[SEED],
        )
    finally:
        env.close()
    return played["action"][0].numpy()

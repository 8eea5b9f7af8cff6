"""How a flow policy acts: one ODE sample a chunk, from noise that can be repeated."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from vla_trqam.data.frame_replay import STATE_KEY, TASK_KEY, image_key
from vla_trqam.envs.rollout import ChunkPolicy
from vla_trqam.policy import FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid


def chunk_policy(
    policy: FlowPolicy,
    noise_seed: int,
    *,
    field: Literal["tuned", "base"] = "tuned",
    num_flow_steps: int | None = None,
) -> ChunkPolicy:
    """What a rollout asks for a chunk, see :data:`~vla_trqam.envs.rollout.ChunkPolicy`.

    The noise of a chunk is a function of ``noise_seed``, the episode's seed and the chunk's number
    alone: two policies evaluated with the same ``noise_seed`` start from the same noise.

    Args:
        policy: whose field acts.
        noise_seed: separates the noise of different purposes.
        field: which of the two acts.
        num_flow_steps: from noise to action; None for the policy's.
    """
    velocity = policy.velocity if field == "tuned" else policy.base_velocity
    grid = TimeGrid(num_flow_steps or policy.num_flow_steps)
    device = next(policy.trainable_parameters()).device

    @torch.no_grad()
    def act(observations: Any, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        noise = np.stack(
            [_noise(policy, noise_seed, *key) for key in zip(seeds, chunks, strict=True)]
        )
        context = policy.encode(_tensors(observations, device))
        x_0 = torch.from_numpy(noise).to(device)
        x_1 = sample_ode(lambda x, tau: velocity(x, tau, context), x_0, grid)
        return policy.to_robot(x_1).cpu().numpy()

    return act


def _tensors(observations: Any, device: torch.device) -> Any:
    """(N, O) as it is; with images LeRobot's raw format, the images float32 in [0, 1]."""
    if not isinstance(observations, dict):
        return torch.from_numpy(np.asarray(observations, dtype=np.float32)).to(device)
    raw: dict[str, Any] = {STATE_KEY: torch.from_numpy(observations["agent_pos"]).to(device)}
    for name, image in observations["pixels"].items():
        pixels = torch.from_numpy(image).to(device).permute(0, 3, 1, 2)
        raw[image_key(name)] = (pixels.float() / 255).contiguous()
    return raw | {TASK_KEY: observations["task"]}


def _noise(policy: FlowPolicy, noise_seed: int, episode_seed: int, chunk: int) -> np.ndarray:
    generator = np.random.default_rng((noise_seed, int(episode_seed), int(chunk)))
    return generator.standard_normal(policy.chunk_shape, dtype=np.float32)

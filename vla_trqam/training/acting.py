"""How a flow policy acts: one ODE sample a chunk, from noise that can be repeated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vla_trqam.policy import FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

ChunkPolicy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def chunk_policy(policy: FlowPolicy, noise_seed: int) -> ChunkPolicy:
    """``(observations (N, O), episode seeds (N,), chunk numbers (N,)) -> chunks (N, H, A)``.

    The noise of a chunk is a function of ``noise_seed``, the episode's seed and the chunk's number
    alone: two policies evaluated with the same ``noise_seed`` start from the same noise.

    Args:
        policy: whose tuned field acts.
        noise_seed: separates the noise of different purposes.
    """
    grid = TimeGrid(policy.num_flow_steps)
    device = next(policy.trainable_parameters()).device

    @torch.no_grad()
    def act(observations: np.ndarray, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        noise = np.stack(
            [_noise(policy, noise_seed, *key) for key in zip(seeds, chunks, strict=True)]
        )
        observation = torch.from_numpy(np.asarray(observations, dtype=np.float32)).to(device)
        context = policy.encode(observation)
        x_0 = torch.from_numpy(noise).to(device)
        return sample_ode(lambda x, tau: policy.velocity(x, tau, context), x_0, grid).cpu().numpy()

    return act


def _noise(policy: FlowPolicy, noise_seed: int, episode_seed: int, chunk: int) -> np.ndarray:
    generator = np.random.default_rng((noise_seed, int(episode_seed), int(chunk)))
    return generator.standard_normal(policy.chunk_shape, dtype=np.float32)

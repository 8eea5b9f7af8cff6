"""How an actor acts in a simulator: from noise that can be repeated, a chunk for an observation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_trqam.data.frames import STATE_KEY, TASK_KEY, image_key
from vla_trqam.envs.rollout import ChunkPolicy
from vla_trqam.methods.base import Actor
from vla_trqam.policy import FlowPolicy


class KeyedNoise:
    """Noise that is a function of each observation's key alone, whatever the batch."""

    def __init__(self, keys: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._generators = [np.random.default_rng(key) for key in keys]
        self._device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape)."""
        drawn = [g.standard_normal(shape, dtype=np.float32) for g in self._generators]
        return torch.from_numpy(np.stack(drawn)).to(self._device)


def chunk_policy(
    policy: FlowPolicy,
    actor: Actor,
    noise_seed: int,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> ChunkPolicy:
    """What a rollout asks for a chunk, see :data:`~vla_trqam.envs.rollout.ChunkPolicy`.

    The noise of a chunk is a function of ``noise_seed``, the episode's seed and the chunk's number
    alone: two actors evaluated with the same ``noise_seed`` start from the same noise.

    Args:
        policy: which sees the observations.
        actor: whose chunks.
        noise_seed: see above.
        precision: what the networks compute in.
    """
    device = next(policy.trainable_parameters()).device

    @torch.no_grad()
    def act(observations: Any, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        keys = [(noise_seed, int(s), int(c)) for s, c in zip(seeds, chunks, strict=True)]
        with precision():
            context = policy.encode(_tensors(observations, device))
            action = actor.chunk(context, KeyedNoise(keys, device))
        return policy.to_robot(action).cpu().numpy()

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

"""Is the critic right where the truth is known? Q beside Monte-Carlo returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.policy import FlowPolicy


@dataclass(frozen=True)
class CriticCheck:
    """Q of executed chunks beside the discounted return that followed.

    Attributes:
        q: mean over the ensemble, (N,).
        returns: Monte-Carlo return-to-go, (N,); NaN where the episode was cut.
        success: the chunk's episode succeeded, (N,).
    """

    q: np.ndarray
    returns: np.ndarray
    success: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Where both numbers exist, (N,)."""
        return np.isfinite(self.q) & np.isfinite(self.returns)


@torch.no_grad()
def check_critic(
    policy: FlowPolicy,
    score: Callable[[Tensor, Tensor], Tensor],
    sampler: ChunkSampler[Any],
    *,
    num_chunks: int = 2000,
    seed: int = 0,
) -> CriticCheck:
    """Evaluates the critic at random whole chunks of the replay.

    The returns are those of the policies that filled the replay, the critic's target is the tuned
    policy: where that one is better, Q above the return is right, not wrong.

    Args:
        policy: what the critic's features come from.
        score: the critic's value of features (B, F) and executed chunks (B, n, a): (B,).
        sampler: of the chunks; its discount and reward make the returns.
        num_chunks: at most so many of them.
        seed: of their choice.
    """
    chosen = np.random.default_rng(seed).permutation(sampler.distinct)[:num_chunks]
    batch = sampler.gather(chosen)
    whole = batch.valid[:, policy.executed_length - 1]
    batch = batch.to(next(policy.trainable_parameters()).device)
    features = policy.features(policy.encode(batch.observation))
    actions = policy.executed(policy.from_robot(batch.action), clip=False)
    q = score(features, actions).cpu()
    returns, success = sampler.outcomes(chosen)
    return CriticCheck(q[whole].numpy(), returns[whole.numpy()], success[whole.numpy()])

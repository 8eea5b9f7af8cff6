"""Is the critic right where the truth is known? Q beside Monte-Carlo returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vla_trqam.critic import Critic
from vla_trqam.data.replay import ReplayBuffer
from vla_trqam.data.sampling import RewardSpec
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
    critic: Critic,
    replay: ReplayBuffer,
    *,
    discount: float,
    reward: RewardSpec,
    num_chunks: int = 2000,
    seed: int = 0,
) -> CriticCheck:
    """Evaluates the critic at random whole chunks of the replay.

    The returns are those of the policies that filled the replay, the critic's target is the tuned
    policy: where that one is better, Q above the return is right, not wrong.
    """
    chunk_length = policy.chunk_shape[0]
    table = replay.episodes()
    last_start = table.num_steps - chunk_length
    episodes = np.repeat(np.arange(len(last_start)), np.maximum(last_start + 1, 0))
    first = np.concatenate([np.arange(n + 1) for n in np.maximum(last_start, -1)])
    chosen = np.random.default_rng(seed).permutation(len(episodes))[:num_chunks]
    episode, offset = episodes[chosen], first[chosen]
    steps = table.first_step[episode] + offset
    actions = replay.actions[steps[:, None] + np.arange(chunk_length)]
    observations = replay.observations[table.first_observation[episode] + offset]
    device = next(policy.trainable_parameters()).device
    features = policy.features(policy.encode(torch.from_numpy(observations).to(device)))
    q = critic.online(features, torch.from_numpy(actions).to(device)).mean(dim=0)
    returns = replay.returns_to_go(discount, reward)[steps]
    return CriticCheck(q.cpu().numpy(), returns, table.success[episode])

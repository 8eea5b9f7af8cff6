"""Episodes with known contents: a function of their seed."""

from dataclasses import dataclass

import numpy as np

from vla_trqam.data.replay import ReplayBuffer

OBSERVATION_DIM, ACTION_DIM = 19, 7


@dataclass(frozen=True)
class RawEpisode:
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool

    def add_to(self, buffer: ReplayBuffer, source: str = "demonstrations") -> None:
        buffer.add_episode(
            self.observations,
            self.actions,
            self.rewards,
            terminated=self.terminated,
            truncated=self.truncated,
            source=source,
            success=self.terminated,
        )


def make_episode(seed: int, num_steps: int, *, terminated: bool, truncated: bool) -> RawEpisode:
    rng = np.random.default_rng(seed)
    rewards = np.zeros(num_steps, np.float32)
    rewards[-1] = terminated
    return RawEpisode(
        observations=rng.normal(size=(num_steps + 1, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32),
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
    )

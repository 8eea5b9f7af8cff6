"""Episodes with known contents: a function of their seed."""

import numpy as np

from vla_trqam.data.episode import Episode

OBSERVATION_DIM, ACTION_DIM = 19, 7


def make_episode(seed: int, num_steps: int, *, terminated: bool, truncated: bool) -> Episode:
    rng = np.random.default_rng(seed)
    rewards = np.zeros(num_steps, np.float32)
    rewards[-1] = terminated
    return Episode(
        observations=rng.normal(size=(num_steps + 1, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32),
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        success=terminated,
    )

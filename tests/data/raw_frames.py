"""Episodes with images whose contents are a function of their seed."""

import numpy as np

from vla_trqam.data.episode import Episode

STATE_DIM, ACTION_DIM = 4, 3
CAMERAS = {"front": (6, 8, 3), "wrist": (5, 5, 3)}


def frame_episode(
    seed: int,
    num_steps: int,
    *,
    terminated: bool,
    every: int = 1,
    final: bool = True,
    task: str = "lift the cube",
) -> Episode:
    """A frame at each `every`-th step, and at the last one if `final`."""
    rng = np.random.default_rng(seed)
    observed = np.arange(num_steps + 1) % every == 0
    observed[-1] = final
    rewards = np.zeros(num_steps, np.float32)
    rewards[-1] = terminated
    return Episode(
        observations=rng.normal(size=(num_steps + 1, STATE_DIM)).astype(np.float32),
        images={
            name: rng.integers(0, 256, (observed.sum(), *shape), dtype=np.uint8)
            for name, shape in CAMERAS.items()
        },
        observed=observed,
        actions=rng.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32),
        rewards=rewards,
        terminated=terminated,
        truncated=not terminated,
        success=terminated,
        task=task,
    )

"""Robomimic tasks as gymnasium vector environments, for code that expects that interface."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from vla_trqam.envs.chunked import ChunkEnv
from vla_trqam.envs.env_meta import LOW_DIM_KEYS
from vla_trqam.envs.robomimic import RobomimicEnv


def make_vector_env(
    env_meta: Mapping[str, Any],
    *,
    num_envs: int,
    max_episode_steps: int,
    chunk_length: int | None = None,
    obs_keys: Sequence[str] = LOW_DIM_KEYS,
    fast_step: bool = True,
) -> gymnasium.vector.AsyncVectorEnv:
    """`num_envs` processes in lock step; `RolloutPool` collects whole episodes faster.

    The processes are spawned: call this under `if __name__ == "__main__":`.

    Args:
        env_meta: a file's `env_args`, see `env_meta.env_meta_for`.
        num_envs: processes.
        max_episode_steps: control steps after which an episode is truncated.
        chunk_length: H for actions (num_envs, H, A) as in `ChunkEnv`; None for single actions.
        obs_keys: observation keys, in the order of concatenation.
        fast_step: see `RobomimicEnv`.
    """
    make = partial(
        _make_env, dict(env_meta), max_episode_steps, chunk_length, tuple(obs_keys), fast_step
    )
    return gymnasium.vector.AsyncVectorEnv([make] * num_envs, context="spawn")


def _make_env(
    env_meta: dict[str, Any],
    max_episode_steps: int,
    chunk_length: int | None,
    obs_keys: tuple[str, ...],
    fast_step: bool,
) -> gymnasium.Env[np.ndarray, np.ndarray]:
    env = RobomimicEnv(
        env_meta, max_episode_steps=max_episode_steps, obs_keys=obs_keys, fast_step=fast_step
    )
    return env if chunk_length is None else ChunkEnv(env, chunk_length)

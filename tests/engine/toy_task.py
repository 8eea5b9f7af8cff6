"""A task without a simulator: a point in the plane that must come near the origin.

`ToyPool` stands in for `RolloutPool`: as there, an episode is a function of its seed
and the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.envs.base import EnvFamily, TaskEnv

OBSERVATION_DIM, ACTION_DIM = 3, 2
NEAR, STEP = 0.25, 0.2
ChunkPolicy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Killed(BaseException):
    """What a `kill -9` looks like from inside: nothing may handle it."""


def observe(position: np.ndarray) -> np.ndarray:
    return np.array([*position, np.linalg.norm(position)], np.float32)


def start_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, ACTION_DIM)


def roll_out(policy: ChunkPolicy, seed: int, max_episode_steps: int) -> Episode:
    position, actions, chunk = start_of(seed), [], []
    observations, number = [observe(position)], 0
    success = False
    while not success and len(actions) < max_episode_steps:
        if not chunk:
            chunk = list(policy(observations[-1][None], np.array([seed]), np.array([number]))[0])
            number += 1
        actions.append(np.clip(chunk.pop(0), -1.0, 1.0))
        position = position + STEP * actions[-1]
        observations.append(observe(position))
        success = bool(np.linalg.norm(position) < NEAR)
    rewards = np.zeros(len(actions), np.float32)
    rewards[-1] = success
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions).astype(np.float32),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
        seed=seed,
    )


def homing_policy(chunk_length: int, noise: float) -> ChunkPolicy:
    """Heads for the origin, more or less."""

    def act(observations: np.ndarray, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng((int(seeds[0]), int(chunks[0])))
        goal = -observations[0, :ACTION_DIM] / (STEP * chunk_length)
        return (goal + noise * rng.normal(size=(1, chunk_length, ACTION_DIM))).astype(np.float32)

    return act


def never_made(rendering: bool) -> TaskEnv:
    raise AssertionError("a toy pool starts no processes")


def toy_family(max_episode_steps: int = 10, **changes: Any) -> EnvFamily:
    """What recipes and pools know of the toy."""
    known = EnvFamily(
        name="robomimic",
        task="Lift",
        make=never_made,
        max_episode_steps=max_episode_steps,
        control_rate=20.0,
        task_texts=("come near the origin",),
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        state_size=OBSERVATION_DIM,
    )
    return replace(known, **changes)


class ToyPool:
    """Takes `RolloutPool`'s arguments; remembers what it was asked.

    Attributes:
        started: how many pools were made since the count was last set to 0.
        rounds: the seeds of every call of `run`, of all pools.
        before_run: called with the number of the call about to be made.
    """

    started: ClassVar[int] = 0
    rounds: ClassVar[list[list[int]]] = []
    before_run: ClassVar[Callable[[int], None] | None] = None

    def __init__(self, family: EnvFamily, **_: Any) -> None:
        self.family, self.max_episode_steps = family, family.max_episode_steps
        type(self).started += 1

    def run(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        *,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> list[Episode]:
        if ToyPool.before_run is not None:
            ToyPool.before_run(len(ToyPool.rounds))
        ToyPool.rounds.append(list(seeds))
        episodes = [roll_out(policy, seed, self.max_episode_steps) for seed in seeds]
        for episode in episodes if on_episode else ():
            on_episode(episode)
        return episodes

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

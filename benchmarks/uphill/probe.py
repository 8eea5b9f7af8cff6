"""The experiment behind `critic_uphill.py`: one chunk is moved, everything after it is the same.

A decision is a state met by a policy on its way. From there the chunk that the policy wants is
executed as it is, moved along the critic's action gradient, against it, or at random, and then a
policy goes on under the same noise to the end. What differs in the returns is the chunk's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gymnasium
import numpy as np
from run_results.combined_runs import pigeonhole_interval

from vla_trqam.data.sampling import RewardSpec
from vla_trqam.engine.acting import ChunkPolicy
from vla_trqam.report.intervals import Interval

Env = gymnasium.Env[np.ndarray, np.ndarray]
Gradient = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(observations (N, O), chunks (N, H, A)) -> action gradient (N, H, A) and value (N,) of Q."""

ARMS = ("up", "down", "random")
CONTRASTS = (
    *(("up", "base"), ("down", "base"), ("random", "base")),
    *(("up", "down"), ("up", "random")),
)


@dataclass(frozen=True, eq=False)
class Decision:
    """A state met by a policy, and how to get there again.

    Attributes:
        seed: of the episode's initial state.
        number: of the decision in its episode.
        before: chunks executed until then, (number, H, A).
        observation: what was seen there, (O,).
        chunk: what the policy wants to do, (H, A).
    """

    seed: int
    number: int
    before: np.ndarray
    observation: np.ndarray
    chunk: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What followed a chunk: discounted return, success, control steps."""

    discounted_return: float
    success: bool
    steps: int


@dataclass(frozen=True)
class Continuation:
    """What happens after the chunk, and how it counts.

    Attributes:
        act: the policy that goes on.
        horizon: control steps from the decision on, after which the return is cut.
        discount: per control step.
        reward: what the critic was to maximise.
    """

    act: ChunkPolicy
    horizon: int
    discount: float
    reward: RewardSpec


@dataclass(frozen=True)
class PairedDifference:
    """Mean over decisions of one arm minus another, with its bootstrap interval."""

    mean: float
    interval: Interval

    @classmethod
    def of(cls, differences: np.ndarray) -> PairedDifference:
        """From one difference a decision, (N,)."""
        values = np.asarray(differences, dtype=np.float64)
        # One row: the bootstrap draws decisions alone, which are independent.
        return cls(float(values.mean()), pigeonhole_interval(values[None]))


def meet_decision(
    env: Env, act: ChunkPolicy, seed: int, max_steps: int, rng: np.random.Generator
) -> Decision:
    """Plays an episode and draws one of its decisions uniformly.

    Args:
        env: a `ChunkEnv`.
        act: the policy.
        seed: of the initial state.
        max_steps: control steps until the episode is cut.
        rng: draws the decision.
    """
    observation, _ = env.reset(seed=seed)
    observations, steps, ended = [observation], 0, False
    chunks: list[np.ndarray] = []
    while not ended:
        chunks.append(_ask(act, observations[-1], seed, len(chunks)))
        observation, _, terminated, truncated, info = env.step(chunks[-1])
        observations.append(observation)
        steps += info["num_steps"]
        ended = terminated or truncated or steps >= max_steps
    number = int(rng.integers(len(chunks)))
    shape = (number, *chunks[0].shape)
    return Decision(
        seed=seed,
        number=number,
        before=np.array(chunks[:number]).reshape(shape),
        observation=observations[number],
        chunk=chunks[number],
    )


def follow(env: Env, decision: Decision, chunk: np.ndarray, after: Continuation) -> Outcome:
    """Goes to the decision again, executes a chunk, and lets the continuation go on.

    Args:
        env: a `ChunkEnv` that does not truncate before the horizon.
        decision: where.
        chunk: (H, A), clipped to [-1, 1] when executed.
        after: what comes then.

    Raises:
        RuntimeError: the simulator did not come to the same observation.
    """
    _return_to(env, decision)
    rewards: list[np.ndarray] = []
    steps, ended, number = 0, False, decision.number
    while not ended and steps < after.horizon:
        observation, _, terminated, truncated, info = env.step(chunk)
        rewards.append(info["chunk_rewards"][: info["num_steps"]])
        steps += info["num_steps"]
        ended, number = terminated or truncated, number + 1
        if not ended:
            chunk = _ask(after.act, observation, decision.seed, number)
    received = np.concatenate(rewards)[: after.horizon]
    worth = after.reward.apply(received).astype(np.float64)
    discounts = after.discount ** np.arange(len(worth))
    return Outcome(float(worth @ discounts), bool(received.any()), len(received))


def moves(gradient: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Directions of root mean square 1 over the chunk's entries, by arm.

    The random one moves the entries that the gradient moves: elsewhere a chunk lies outside the
    box, and would be clipped back. Without a gradient there is no direction: all are zero.

    Args:
        gradient: (H, A).
        rng: draws the random direction.
    """
    noise = rng.standard_normal(gradient.shape) * (gradient != 0.0)
    up = _unit(gradient)
    return {"up": up, "down": -up, "random": _unit(noise)}


def arms_of(
    decisions: Sequence[Decision], gradient_of: Gradient, step: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The moved chunks (N, H, A) of every arm but "base".

    Args:
        decisions: N decisions.
        gradient_of: the critic's.
        step: root mean square of the move over a chunk's entries.
        rng: draws the random directions.
    """
    chunks = np.stack([decision.chunk for decision in decisions])
    gradient, _ = gradient_of(np.stack([d.observation for d in decisions]), chunks)
    directions = [moves(each, rng) for each in gradient]
    return {
        arm: chunks + step * np.stack([direction[arm] for direction in directions]) for arm in ARMS
    }


def executed_move(moved: np.ndarray, chunks: np.ndarray) -> float:
    """Root mean square of what a move changes of the executed chunks, after the clip."""
    change = moved.clip(-1.0, 1.0) - chunks.clip(-1.0, 1.0)
    return float(np.sqrt(np.square(change).mean()))


def _unit(direction: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.square(direction, dtype=np.float64).mean())
    return direction / size if size > 0.0 else np.zeros_like(direction)


def _ask(act: ChunkPolicy, observation: np.ndarray, seed: int, number: int) -> np.ndarray:
    chunk: np.ndarray = act(observation[None], np.array([seed]), np.array([number]))[0]
    return chunk


def _return_to(env: Env, decision: Decision) -> None:
    observation, _ = env.reset(seed=decision.seed)
    for chunk in decision.before:
        observation = env.step(chunk)[0]
    if not np.array_equal(observation, decision.observation):
        raise RuntimeError(
            f"the simulator did not repeat itself: seed {decision.seed}, decision "
            f"{decision.number} is another state than before"
        )

"""Alarms: what a line of metrics shows to be wrong while there is time to stop and mend it.

Each is a function of logged numbers alone. So a resumed run's alarms, shown the lines that it kept,
are where the interrupted run's were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_trqam.data.sampling import SUCCESS_REWARDS, ChunkSampler

Line = Mapping[str, Any]
Finding = Callable[[Line], str | None]
"""Of a line of metrics: what is wrong and what to try; "" for nothing, None where it tells not."""
Range = tuple[float, float]

PREFIX = "alarm_"
ROLLED_OUT = ("critic", "offline", "online")
MOST_CLIPPED = 0.5
# Adam's epsilon: a gradient below it makes steps below the step size, and in the end none.
DEAD_GRADIENT = 1e-8
# Beyond the range, for a network's mean value has an error; a share of its larger end.
Q_TOLERANCE = 0.1


@dataclass(frozen=True)
class Rule:
    """One alarm.

    Attributes:
        name: under which it is logged, after :data:`PREFIX`.
        patience: logged lines in a row on which it must be so.
        finding: what is so.
    """

    name: str
    patience: int
    finding: Finding


@dataclass(frozen=True)
class Looked:
    """What a line of metrics told.

    Attributes:
        numbers: to log with it: 1 for an alarm that is on, 0 where it has just ended.
        sentences: of the alarms that begin here.
    """

    numbers: dict[str, float]
    sentences: list[str]


class Alarms:
    """The alarms of a run, shown one line of metrics after the other.

    Args:
        q_range: what Q can be, see :func:`q_range`; None where that is not known.
    """

    def __init__(self, q_range: Range | None = None) -> None:
        self._rules = [
            Rule("lam_on_bound", 10, lam_on_bound),
            Rule("q_out_of_range", 3, lambda line: q_out_of_range(line, q_range)),
            Rule("actions_clipped", 3, actions_clipped),
            Rule("dead_gradient", 3, dead_gradient),
        ]
        self._in_a_row: Counter[str] = Counter()

    def look(self, line: Line) -> Looked:
        """Takes in a line."""
        numbers: dict[str, float] = {}
        sentences = []
        for rule in self._rules:
            sentence = rule.finding(line)
            if sentence is None:
                continue
            was_on = self._in_a_row[rule.name] >= rule.patience
            self._in_a_row[rule.name] = self._in_a_row[rule.name] + 1 if sentence else 0
            is_on = self._in_a_row[rule.name] >= rule.patience
            if is_on or was_on:
                numbers[PREFIX + rule.name] = int(is_on)
            if is_on and not was_on:
                sentences.append(f"alarm {rule.name}: {sentence}")
        return Looked(numbers, sentences)

    def restart(self, lines: Iterable[Line]) -> None:
        """As after these lines and no others."""
        self._in_a_row.clear()
        for line in lines:
            self.look(line)


def lam_on_bound(line: Line) -> str | None:
    """Lambda on an end of its bracket cannot hold the KL to its budget from there."""
    if not {"lam", "lam_min", "lam_max"} <= line.keys():
        return None
    lam, low, high = (float(line[name]) for name in ("lam", "lam_min", "lam_max"))
    if math.isclose(lam, low, rel_tol=1e-6):
        return (
            f"lambda stays on its lower bound {low:g}: the critic's gradient does not use the KL "
            "budget; try a smaller --method.lam_min or --method.kl_budget, or a longer warm-up of "
            "the critic"
        )
    if math.isclose(lam, high, rel_tol=1e-6):
        return (
            f"lambda stays on its upper bound {high:g}: the KL may exceed its budget; try a larger "
            "--method.lam_max, a smaller --method.actor_lr, or --critic.adjoint_pessimism"
        )
    return ""


def q_out_of_range(line: Line, limits: Range | None) -> str | None:
    """Values that no sequence of rewards has: the critic's errors feed themselves."""
    if limits is None or "q_mean" not in line:
        return None
    low, high = limits
    slack = Q_TOLERANCE * max(abs(low), abs(high))
    q = float(line["q_mean"])
    if low - slack <= q <= high + slack or math.isnan(q):
        return ""
    side = "below" if q < low else "above"
    return (
        f"the mean Q is {q:.4g}, {side} all that rewards can give ({low:.4g} to {high:.4g}): the "
        "critic diverges; try a smaller --method.critic_lr or --critic.target_rate, or a larger "
        "--critic.pessimism"
    )


def actions_clipped(line: Line) -> str | None:
    """Beyond the limits the critic's gradient is zero, and the policy's samples stay there."""
    if "clipped_action_fraction" not in line:
        return None
    share = float(line["clipped_action_fraction"])
    if not share > MOST_CLIPPED:
        return ""
    return (
        f"{share:.0%} of the policy's actions lie beyond their limits, where the critic's gradient "
        "is zero: look whether policy and data are normalised alike, or try a smaller "
        "--method.kl_budget"
    )


def dead_gradient(line: Line) -> str | None:
    """The policy does not learn, though lambda would let it."""
    if not {"actor_grad_norm", "lam"} <= line.keys() or not math.isfinite(float(line["lam"])):
        return None
    norm = float(line["actor_grad_norm"])
    if not norm < DEAD_GRADIENT:
        return ""
    return (
        f"the norm of the policy's gradient is {norm:.2g}: it does not move; look whether the "
        "rewards differ at all, or try a longer warm-up of the critic"
    )


def q_range(rewards: Range, discount: float) -> Range | None:
    """The least and the largest discounted return; None where all rewards are 0.

    Args:
        rewards: the least and the largest reward of a step.
        discount: gamma, per step. A chunk's return and discount are made of the same steps.
    """
    low, high = rewards
    longest = 1.0 / (1.0 - discount)
    # The least of only positive rewards is one alone, and so on.
    limits = min(low, low * longest), max(high, high * longest)
    return None if limits == (0.0, 0.0) else limits


def reward_range(sampler: ChunkSampler[Any], *, rolls_out: bool) -> Range:
    """The least and the largest reward that a run can meet.

    Args:
        sampler: of all data.
        rolls_out: whether episodes of the simulators join it, with their rewards of 0 and 1.
    """
    reward = sampler.reward
    kinds = {reward.kind, *reward.of_sources.values()}
    found = [end for kind in kinds & SUCCESS_REWARDS.keys() for end in SUCCESS_REWARDS[kind]]
    for buffer in sampler.buffers if {"column", "dense"} & kinds else ():
        episodes = buffer.episodes()
        # Without rollouts, of which a run that is gone on with has some from the beginning.
        given = np.repeat(~np.isin(episodes.source, ROLLED_OUT), episodes.num_steps)
        if "column" in kinds:
            rewards = buffer.rewards_as(reward)[given]
            found += rewards[np.isfinite(rewards)].tolist()
        if "dense" in kinds:
            found += [0.0, float(buffer.rewards[given].min(initial=0.0))]
    if reward.kind == "column" and rolls_out:
        found += [0.0, 1.0]
    return min(found, default=0.0), max(found, default=0.0)

"""Whether a policy can learn from a replay: shapes, cameras, statistics, rewards, chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vla_trqam.data.frames import STATE_KEY, image_key
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

ACTION_KEY = "action"
MAX_ROWS = 200_000
"""So many rows, evenly spread, are compared with the statistics."""

FAR_OUT = {"MEAN_STD": 5.0, "QUANTILES": 2.0, "QUANTILE10": 2.0, "MIN_MAX": 2.0}
"""By LeRobot's normalisation: the |normalised| beyond which a number lies far out."""
ALLOWED_FAR_OUT = 0.25
"""The share of rows that may lie far out in a dimension.

Of the data that the statistics were made of, at most 1/25 lies beyond 5 standard deviations
(Chebyshev), 1/50 outside the quantiles q01 and q99, 1/5 outside q10 and q90, none outside the
range; a policy's own rollouts lie further out than the demonstrations that it learned from (6% have
been seen), data in other units nearly all.
"""
STILL = 0.02
"""Numbers whose normalised standard deviation is below this in every dimension do not move."""


def check_shapes(policy: LeRobotFlowPolicy, replay: Replay) -> Finding:
    """State and action dimensions of policy and data."""
    config = policy.host.config
    state, real = config.robot_state_feature, int(policy.action_mask.sum())
    wanted = {ACTION_KEY: real} | ({} if state is None else {STATE_KEY: state.shape[0]})
    there = {ACTION_KEY: replay.action_dim, STATE_KEY: replay.observation_dim}
    wrong = [key for key in wanted if wanted[key] != there[key]]
    if wrong:
        found = ", ".join(f"{key} has {there[key]} dimensions in the data" for key in wrong)
        right = ", ".join(f"{key} of {wanted[key]}" for key in wrong)
        return Finding.failure("dimensions", found, f"{right}, as the policy was trained")
    length, width = policy.chunk_shape
    found = f"action {real} of the flow's {width} ({width - real} are padding)"
    return Finding("dimensions", f"{found}, chunks of {length}; state {there[STATE_KEY]}")


def check_cameras(policy: LeRobotFlowPolicy, replay: Replay) -> Finding:
    """Every camera that the policy needs, with as many channels."""
    there = {image_key(name): shape for name, shape in replay.cameras.items()}
    cameras, features = policy.cameras(there), policy.host.config.image_features
    if not cameras.fit:
        return Finding.failure(
            "cameras",
            f"the policy looks through {', '.join(cameras.missing)}; the data has {_names(there)}",
            "data with these cameras, or a --rename_map from its names to the policy's",
        )
    wanted = {key: tuple(features[key].shape) for key in cameras.seen}
    wrong = [key for key in wanted if there[key][2] != wanted[key][0]]
    if wrong:
        return Finding.failure(
            "cameras",
            ", ".join(f"{key} has {there[key][2]} channels in the data" for key in wrong),
            ", ".join(f"{key} with {wanted[key][0]}" for key in wrong),
        )
    found = "; ".join(_camera(key, there[key], wanted[key]) for key in wanted) or "none"
    if cameras.missing:
        found += f"; {cameras.instead}: {', '.join(cameras.missing)}"
    if cameras.unseen:
        found += f"; not looked at: {', '.join(cameras.unseen)}"
    return Finding("cameras", found)


def _camera(key: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    height, width = wanted[1:]
    resized = "" if there[:2] == (height, width) else f", trained on {height}x{width}: resized"
    return f"{key} {there[0]}x{there[1]} uint8{resized}"


def _names(keys: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(keys) or "none"


def check_statistics(
    policy: LeRobotFlowPolicy, replay: Replay, sources: Collection[str] | None = None
) -> Finding:
    """The data of these sources, by the policy's statistics, lies where the policy was trained."""
    if policy.processors is None:
        return Finding.failure(
            "statistics", "the policy has no processors", "a checkpoint with its processors"
        )
    problems = list(policy.processors.statistics_problems())
    if problems:
        return Finding.failure(
            "statistics", "; ".join(problems), "the processors that were saved with the policy"
        )
    problems, notes = [], []
    for key, raw in _numbers(policy, replay, sources).items():
        mode = str(policy.processors.mode(key).value)
        if mode not in FAR_OUT:
            notes.append(f"{key} is not normalised")
            continue
        normalized = policy.processors.normalize(key, raw).cpu()
        judged = [dim for dim in range(raw.shape[1]) if not policy.processors.flat(key)[dim]]
        problems += _misfits(key, raw, normalized, mode, judged)
        notes.append(_fit(key, normalized, mode, judged))
    if problems:
        return Finding.failure(
            "statistics",
            "; ".join(problems),
            "data in the units and of the robot that the policy was trained with, or a policy "
            "whose statistics were made of such data",
        )
    return Finding("statistics", "; ".join(notes))


def _numbers(
    policy: LeRobotFlowPolicy, replay: Replay, sources: Collection[str] | None
) -> dict[str, Tensor]:
    """(N, d) rows of what the policy normalises, in the data's units."""
    episodes, found = replay.episodes(), {}
    mine = np.isin(episodes.source, episodes.source if sources is None else list(sources))
    if policy.host.config.robot_state_feature is not None:
        found[STATE_KEY] = _spread_rows(replay.observations, mine.repeat(episodes.num_steps + 1))
    found[ACTION_KEY] = _spread_rows(replay.actions, mine.repeat(episodes.num_steps))
    return found


def _spread_rows(rows: np.ndarray, mine: np.ndarray) -> Tensor:
    wanted = np.flatnonzero(mine)
    every = -(-len(wanted) // MAX_ROWS) or 1
    return torch.from_numpy(np.array(rows[wanted[::every]], dtype=np.float32))


def _misfits(
    key: str, raw: Tensor, normalized: Tensor, mode: str, judged: Sequence[int] | None = None
) -> Iterator[str]:
    """Of the dimensions that the statistics can judge; None takes all."""
    limit, judged = FAR_OUT[mode], range(raw.shape[1]) if judged is None else judged
    share = (normalized.abs() > limit).float().mean(dim=0)
    for dim in judged:
        if float(share[dim]) > ALLOWED_FAR_OUT:
            yield (
                f"{key}[{dim}] lies from {raw[:, dim].min():.4g} to {raw[:, dim].max():.4g}, which "
                f"is for {share[dim]:.0%} of the data more than {limit:g} from the middle of the "
                f"policy's normalised range ({mode})"
            )
    spread = [float(normalized[:, dim].std(correction=0)) for dim in judged]
    if spread and max(spread) < STILL:
        yield (
            f"{key} hardly moves: its normalised standard deviation is at most {max(spread):.2g} "
            "in any dimension"
        )


def _fit(key: str, normalized: Tensor, mode: str, judged: Sequence[int]) -> str:
    limit = FAR_OUT[mode]
    share = (normalized.abs() > limit).float().mean(dim=0)
    still = [f"{key}[{dim}]" for dim in range(normalized.shape[1]) if dim not in judged]
    note = f"; not judged, for its statistics have no spread: {', '.join(still)}" if still else ""
    if not judged:
        return f"{key} {mode}{note}"
    dim = max(judged, key=lambda d: float(share[d]))
    return f"{key} {mode}, at most {share[dim]:.1%} beyond {limit:g} ({key}[{dim}]){note}"


@dataclass(frozen=True)
class RewardSummary:
    """What the rewards of a replay tell."""

    kind: str
    low: float
    high: float
    episodes: int
    successes: int
    terminated: int

    @classmethod
    def of(cls, replay: Replay, sampler: ChunkSampler[Any]) -> RewardSummary:
        """Of the steps that chunks reach, in a replay with at least one episode."""
        episodes, rewards = replay.episodes(), replay.rewards_as(sampler.reward)
        if sampler.num_starts:  # without any, that is what is to be said
            rewards = rewards[sampler.reached_steps[: len(rewards)]]
        return cls(
            sampler.reward.label,
            float(rewards.min()),
            float(rewards.max()),
            len(episodes),
            int(episodes.success.sum()),
            int(episodes.terminated.sum()),
        )

    @classmethod
    def joined(cls, parts: Sequence[RewardSummary]) -> RewardSummary:
        """Of several replays together."""
        return cls(
            parts[0].kind,
            min(part.low for part in parts),
            max(part.high for part in parts),
            sum(part.episodes for part in parts),
            sum(part.successes for part in parts),
            sum(part.terminated for part in parts),
        )


def check_reward(rewards: RewardSummary) -> Finding:
    """Something tells a good episode from a bad one."""
    low, high = rewards.low, rewards.high
    found = (
        f"{rewards.kind}: {low:g} to {high:g}; {rewards.successes} of "
        f"{rewards.episodes} episodes succeed, {rewards.terminated} terminate"
    )
    # A constant cost of every step tells something only where episodes end at different times.
    if low == high and (low == 0.0 or rewards.terminated == 0):
        return Finding.failure(
            "reward",
            f"every step that a chunk reaches has the reward {low:g} ({found})",
            "a replay in which some episodes succeed, or a reward that tells better from worse",
        )
    if rewards.successes == rewards.episodes:
        found += "; no failure is among them, and a critic that sees none learns speed alone"
    return Finding("reward", found)


def check_chunks(
    policy: LeRobotFlowPolicy,
    replay: Replay,
    sampler: ChunkSampler[Any],
) -> Finding:
    """Chunks can be drawn: frames lie where they begin and end."""
    executed = policy.executed_length
    spacing, starts = _frame_spacing(replay), sampler.num_starts
    if spacing and executed % spacing:
        return Finding.failure(
            "chunks",
            f"frames lie {spacing} steps apart, {executed} actions are executed",
            f"--policy.n_action_steps a multiple of {spacing}, or frames every {executed} steps",
        )
    if not starts:
        return Finding.failure(
            "chunks",
            f"no chunk of {executed} steps can be drawn from {replay.num_episodes} episodes",
            "longer episodes or a smaller --policy.n_action_steps",
        )
    frames = f"frames every {spacing} steps" if spacing else "one frame an episode"
    return Finding(
        "chunks",
        f"{executed} of {policy.chunk_shape[0]} actions are executed; {frames}; "
        f"{starts} chunks to draw",
    )


def _frame_spacing(replay: Replay) -> int:
    """The usual number of steps from frame to frame; 0 where no episode has two frames."""
    rows = replay.frame_index.rows_of_frames()
    episode = np.searchsorted(replay.episodes().first_observation, rows, side="right")
    gaps = np.diff(rows)[np.diff(episode) == 0]
    return int(np.bincount(gaps).argmax()) if len(gaps) else 0

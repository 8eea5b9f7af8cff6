"""Whether a policy can learn from a replay: shapes, cameras, rewards, chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vla_trqam.data.frames import STATE_KEY, image_key
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

ACTION_KEY = "action"


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


def check_chunks(policy: LeRobotFlowPolicy, replay: Replay, sampler: ChunkSampler[Any]) -> Finding:
    """Chunks can be drawn: episodes are long enough."""
    executed, starts = policy.executed_length, len(sampler.distinct)
    if not starts:
        return Finding.failure(
            "chunks",
            f"no chunk of {executed} steps can be drawn from {replay.num_episodes} episodes",
            "longer episodes or a smaller --policy.n_action_steps",
        )
    weighed = f", which count as {count}" if (count := sampler.num_starts) > starts else ""
    found = f"{executed} of {policy.chunk_shape[0]} actions are executed; {starts} to draw"
    return Finding("chunks", found + weighed)

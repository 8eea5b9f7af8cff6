"""The preflight of a run of a LeRobot policy, from its settings: before and after decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets
from vla_trqam.engine.folder.checkpoints import all_checkpoints
from vla_trqam.engine.folder.run_folder import replay_path
from vla_trqam.engine.launch import make_critic
from vla_trqam.engine.processes.team import Team
from vla_trqam.methods.registry import requirements_of
from vla_trqam.preflight.checks import (
    PreflightReport,
    ReplayPlan,
    RewardSummary,
    Share,
    preflight,
    preflight_machine,
)
from vla_trqam.preflight.disk import NUMBER
from vla_trqam.preflight.prefixes import PrefixPlan, measure_prefix, plan_prefixes


def check_machine(
    config: FinetuneVLAConfig,
    datasets: LeRobotDatasets,
    policy: LeRobotFlowPolicy,
    team: Team,
    prefixes: Callable[[], PrefixPlan],
) -> None:
    """Prints what was found before anything is decoded or written.

    Raises:
        UserError: something cannot work.
    """
    output_dir = config.output_dir
    assert output_dir is not None
    more_steps, _ = room_for_rollouts(config, policy.executed_length)
    plan = ReplayPlan(
        path=replay_path(output_dir, team),
        steps=datasets.num_rows + more_steps,
        frames=num_frames(config, datasets, policy),
        state_dim=datasets.first.state_dim,
        action_dim=datasets.first.action_dim,
        cameras=datasets.first.cameras,
        next_actions=_kept_next_actions(config),
        lent=datasets.num_frames if config.replay.frames == "dataset" else 0,
    )
    whole = -(-(config.steps + config.online.steps) // config.save_freq) + 1
    report = preflight_machine(
        policy,
        datasets.whole.named,  # of which a part could look otherwise
        plan,
        critic=make_critic(config.critic, policy, config.seed),
        method=config.method,
        share=Share(
            team.batch_share(config.batch_size),
            config.micro_batches,
            team.size,
            shards=team.size if config.peft.shard else 1,
            recorded=config.policy.cuda_graphs,
        ),
        output_dir=output_dir,
        num_checkpoints=max(1, whole - len(all_checkpoints(output_dir))),
        merged=config.policy.merged,
        prefixes=prefixes,
        precision=team.autocast,
    )
    _tell(report, team)


def _kept_next_actions(config: FinetuneVLAConfig) -> int:
    """M, the chunks of the policy kept at every frame; 0 for a method that has none."""
    return config.critic.next_actions if requirements_of(config.method).next_actions else 0


def planned_prefixes(
    config: FinetuneVLAConfig,
    datasets: LeRobotDatasets,
    policy: LeRobotFlowPolicy,
    team: Team,
    critic_features: tuple[str, ...],
) -> Callable[[], PrefixPlan]:
    """Where the run's prefixes come from, found when it is first asked; all processes must call."""
    assert config.output_dir is not None
    every = sum(team.gather(num_frames(config, datasets, policy)))
    batch_size, replay = config.batch_size, replay_path(config.output_dir, team)
    wanted, budget = config.prefix_cache, config.prefix_cache_gib
    draw_next, processes = config.critic.draw_next, team.size
    chunks = _kept_next_actions(config) * policy.executed_size * NUMBER

    @cache
    def plan() -> PrefixPlan:
        seen = datasets.first.first_observation()
        with team.autocast():
            cost = measure_prefix(policy, seen, critic_features, chunks)
        return plan_prefixes(
            wanted,
            budget,
            cost,
            frames=every,
            batch_size=batch_size,
            replay=replay,
            draw_next=draw_next,
            processes=processes,
        )

    return plan


def num_frames(
    config: FinetuneVLAConfig, datasets: LeRobotDatasets, policy: LeRobotFlowPolicy
) -> int:
    """Of this process's replay when it is full."""
    _, more = room_for_rollouts(config, policy.executed_length)
    return datasets.num_frames + more


def check_data(
    config: FinetuneVLAConfig,
    policy: LeRobotFlowPolicy,
    replay: Replay,
    everything: ChunkSampler[Any],
    rewards: RewardSummary | None,
    team: Team,
) -> None:
    """Prints what was found.

    Raises:
        UserError: something cannot work.
    """
    report = preflight(
        policy,
        replay,
        everything,
        rewards=rewards,
        resumed=config.resume or config.policy.adapter == "continue",
    )
    _tell(report, team)


def all_rewards(replay: Replay, everything: ChunkSampler[Any], team: Team) -> RewardSummary | None:
    """Of all processes: the episodes of one may all fail."""
    if team.size == 1:
        return None
    parts = team.gather(asdict(RewardSummary.of(replay, everything)))
    return RewardSummary.joined([RewardSummary(**part) for part in parts])


def _tell(report: PreflightReport, team: Team) -> None:
    if team.is_main:
        print("\n".join(report.lines()))
    report.raise_on_failure()


def room_for_rollouts(config: FinetuneVLAConfig, executed_length: int) -> tuple[int, int]:
    """Steps and frames that all rollouts of the training take at most."""
    episodes, limit = config.num_training_episodes, config.eval.max_episode_steps
    # A frame for every decision, and one where the limit cuts.
    decisions = -(-limit // executed_length) + 1
    return episodes * limit, episodes * decisions

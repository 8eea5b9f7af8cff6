"""The preflight of a run of a LeRobot policy, from its settings: before and after decoding."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets, source_names
from vla_trqam.engine.folder.checkpoints import all_checkpoints
from vla_trqam.engine.folder.run_folder import replay_path
from vla_trqam.engine.launch import make_critic
from vla_trqam.engine.processes.team import Team
from vla_trqam.preflight.checks import (
    PreflightReport,
    ReplayPlan,
    RewardSummary,
    Share,
    preflight,
    preflight_machine,
)


def check_machine(
    config: FinetuneVLAConfig, datasets: LeRobotDatasets, policy: LeRobotFlowPolicy, team: Team
) -> None:
    """Prints what was found before anything is decoded or written.

    Raises:
        UserError: something cannot work.
    """
    output_dir = config.output_dir
    assert output_dir is not None
    more_steps, more_frames = room_for_rollouts(config, policy.chunk_shape[0])
    plan = ReplayPlan(
        path=replay_path(output_dir, team),
        steps=datasets.num_rows + more_steps,
        frames=datasets.num_frames + more_frames,
        state_dim=datasets.first.state_dim,
        action_dim=datasets.first.action_dim,
        cameras=datasets.first.cameras,
        next_actions=config.critic.next_actions,
    )
    whole = -(-(config.steps + config.online.steps) // config.save_freq) + 1
    report = preflight_machine(
        policy,
        datasets.named,
        plan,
        critic=make_critic(config.critic, policy, config.seed),
        method=config.method,
        share=Share(team.batch_share(config.batch_size), config.micro_batches, team.size),
        output_dir=output_dir,
        num_checkpoints=max(1, whole - len(all_checkpoints(output_dir))),
    )
    _tell(report, team)


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
        execution_horizon=policy.host.config.n_action_steps,
        sources=source_names(1 + len(config.dataset.more)),
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


def room_for_rollouts(config: FinetuneVLAConfig, chunk_length: int) -> tuple[int, int]:
    """Steps and frames that all rollouts of the training take at most."""
    episodes, limit = config.num_training_episodes, config.eval.max_episode_steps
    # A frame for every decision, and one where the limit cuts.
    decisions = -(-limit // chunk_length) + 1
    return episodes * limit, episodes * decisions

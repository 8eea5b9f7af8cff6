"""What is looked at before the first step, so that a run that cannot work does not start."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.frame_replay import FrameReplay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.errors import UserError
from vla_trqam.training import preflight_data as data
from vla_trqam.training import preflight_memory as memory
from vla_trqam.training import preflight_model as model
from vla_trqam.training.next_actions import NumberedFeatures
from vla_trqam.training.preflight_data import RewardSummary
from vla_trqam.training.preflight_memory import Share
from vla_trqam.training.preflight_report import Finding, PreflightReport

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

__all__ = ["Finding", "PreflightReport", "RewardSummary", "Share", "preflight"]


def preflight(
    policy: LeRobotFlowPolicy,
    replay: FrameReplay,
    sampler: ChunkSampler[Any],
    *,
    critic: nn.Module | None = None,
    share: Share,
    output_dir: Path,
    execution_horizon: int,
    num_checkpoints: int,
    sources: Collection[str] | None = None,
    rewards: RewardSummary | None = None,
    resumed: bool = False,
) -> PreflightReport:
    """Looks at policy, data and machine; changes nothing.

    Args:
        policy: on its device.
        replay: the data to begin with.
        sampler: of the chunks to train on, with their reward; a `FeatureCache` as its observer
            counts towards the disk.
        critic: with its target; counts towards memory and disk.
        share: of an update, that this process has.
        output_dir: of the run.
        execution_horizon: actions executed of each chunk.
        num_checkpoints: that the run keeps.
        sources: of the replay that were given to the run. Its own rollouts may leave what the
            policy's statistics know, data in other units may not. None judges all.
        rewards: of all processes' replays; None for those of this one.
        resumed: training goes on, so the tuned field may differ from the base.

    Returns:
        All findings; print `lines()` and call `raise_on_failure()`.

    Raises:
        UserError: the replay is empty.
    """
    if replay.num_episodes == 0:
        raise UserError(f"The replay {replay.path} is empty: training begins with data.")
    machine = _Machine(policy, replay, sampler, critic, share, output_dir, num_checkpoints)
    seen = ("dimensions", "cameras", "statistics")
    passes = (*seen, "observation")
    checks = [
        _Check("dimensions", lambda: data.check_shapes(policy, replay)),
        _Check("cameras", lambda: data.check_cameras(policy, replay)),
        _Check("statistics", lambda: data.check_statistics(policy, replay, sources), seen[:1]),
        _Check("reward", lambda: data.check_reward(rewards or RewardSummary.of(replay, sampler))),
        _Check("chunks", lambda: data.check_chunks(policy, replay, sampler, execution_horizon)),
        _Check("parameters", lambda: memory.check_parameters(policy)),
        _Check("observation", lambda: model.check_observation(policy, replay), seen),
        _Check("time direction", lambda: model.check_time_direction(policy, replay), passes),
        _Check("base", lambda: model.check_base(policy, replay, resumed=resumed), passes),
        _Check("gradient", machine.check_gradient, passes),
        _Check("memory", machine.check_memory, passes),
        _Check("disk", machine.check_disk, passes),
    ]
    return _run(checks)


@dataclass(frozen=True)
class _Check:
    """One line of the table: its name, what finds it, and which others must be sound for that."""

    name: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()


def _run(checks: list[_Check]) -> PreflightReport:
    sound: set[str] = set()
    findings, not_run = [], []
    for check in checks:
        if not sound.issuperset(check.needs):
            not_run.append(check.name)
            continue
        finding = check.run()
        findings.append(finding)
        if finding.ok:
            sound.add(check.name)
    return PreflightReport(tuple(findings), tuple(not_run))


@dataclass(frozen=True)
class _Machine:
    """What the run asks of the machine; measured once for memory and disk."""

    policy: LeRobotFlowPolicy
    replay: FrameReplay
    sampler: ChunkSampler[Any]
    critic: nn.Module | None
    share: Share
    output_dir: Path
    num_checkpoints: int

    @cached_property
    def dry(self) -> memory.DryPass:
        return memory.dry_pass(self.policy, self.replay)

    @cached_property
    def memory(self) -> memory.Memory:
        return memory.measure_memory(self.policy, self.critic, self.dry)

    def check_gradient(self) -> Finding:
        return memory.check_gradient(self.dry, self.policy)

    def check_memory(self) -> Finding:
        device = model.device_of(self.policy)
        available = memory.available_memory(device)
        return memory.check_memory(self.memory, available, self.share, device.type)

    def check_disk(self) -> Finding:
        disk = memory.measure_disk(
            self.policy,
            self.replay,
            self.critic,
            self.memory,
            num_checkpoints=self.num_checkpoints,
            caches=isinstance(self.sampler.observer, FeatureCache | NumberedFeatures),
            processes=self.share.processes,
        )
        return memory.check_disk(disk, self.replay.path, self.output_dir)

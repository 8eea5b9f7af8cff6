"""What is looked at before the first step, so that a run that cannot work does not start.

First what needs no picture of the dataset (:func:`preflight_machine`), before a folder is made;
then, when it is decoded, what is in it (:func:`preflight`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig
from vla_trqam.preflight import data, disk, memory, model, tables
from vla_trqam.preflight.data import RewardSummary
from vla_trqam.preflight.disk import ReplayPlan
from vla_trqam.preflight.memory import Share
from vla_trqam.preflight.outliers import check_outliers
from vla_trqam.preflight.prefixes import PrefixPlan
from vla_trqam.preflight.report import Finding, PreflightReport

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
    from vla_trqam.data.sources.lerobot.source import LeRobotReader

__all__ = [
    "Finding",
    "PreflightReport",
    "ReplayPlan",
    "RewardSummary",
    "Share",
    "preflight",
    "preflight_machine",
]


def preflight_machine(
    policy: LeRobotFlowPolicy,
    readers: Mapping[str, LeRobotReader],
    plan: ReplayPlan,
    *,
    critic: nn.Module | None = None,
    method: MethodConfig,
    share: Share,
    output_dir: Path,
    num_checkpoints: int,
    merged: bool = False,
    prefixes: Callable[[], PrefixPlan],
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> PreflightReport:
    """Looks at policy, tables and machine before anything is decoded; changes nothing.

    The readers go by their datasets' names in the replay, and checkpoints are those still to come,
    with the adapters ``merged`` into whole weights or alone.
    ``prefixes`` is asked once the policy was seen to take an observation, and ``precision`` is what
    the run's evaluations are made in.

    Returns:
        All findings; print `lines()` and call `raise_on_failure()`.
    """
    machine = _Machine(
        policy,
        readers,
        plan,
        critic,
        method,
        share,
        output_dir,
        num_checkpoints,
        merged,
        prefixes,
        precision,
    )
    takes, known = ("observation",), ("statistics",)
    return _run(
        [
            *(
                _Check(f"{check}{_of(name, readers)}", partial(look, policy, reader))
                for name, reader in readers.items()
                for check, look in (
                    ("outliers", check_outliers),
                    ("statistics", tables.check_statistics),
                    ("frames", tables.check_frames),
                )
            ),
            _Check("instructions", lambda: tables.check_instructions(policy, readers), known),
            _Check("parameters", lambda: memory.check_parameters(policy)),
            _Check("observation", machine.check_observation),
            _Check("prefixes", lambda: prefixes().finding(), takes),
            _Check("gradient", machine.check_gradient, takes),
            _Check("memory", machine.check_memory, takes),
            _Check("disk", machine.check_disk, takes),
        ]
    )


def preflight(
    policy: LeRobotFlowPolicy,
    replay: Replay,
    sampler: ChunkSampler[Any],
    *,
    rewards: RewardSummary | None = None,
    resumed: bool = False,
) -> PreflightReport:
    """Looks at the policy and its data; changes nothing.

    Args:
        policy: on its device.
        replay: the data to begin with.
        sampler: of the chunks to train on, with their reward.
        rewards: of all processes' replays; None for those of this one.
        resumed: training goes on, so the tuned field may differ from the base.

    Returns:
        All findings; print `lines()` and call `raise_on_failure()`.

    Raises:
        UserError: the replay is empty.
    """
    if replay.num_episodes == 0:
        raise UserError(f"The replay {replay.path} is empty: training begins with data.")
    seen = ("dimensions", "cameras")
    return _run(
        [
            _Check("dimensions", lambda: data.check_shapes(policy, replay)),
            _Check("cameras", lambda: data.check_cameras(policy, replay)),
            _Check(
                "reward", lambda: data.check_reward(rewards or RewardSummary.of(replay, sampler))
            ),
            _Check("chunks", lambda: data.check_chunks(policy, replay, sampler)),
            _Check("time direction", lambda: model.check_time_direction(policy, replay), seen),
            _Check("base", lambda: model.check_base(policy, replay, resumed=resumed), seen),
        ]
    )


def _of(name: str, names: Collection[str]) -> str:
    """Which dataset a line is about, where there are several and it is not the first."""
    return "" if name == next(iter(names)) else f" of {name}"


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
        finding = replace(check.run(), name=check.name)
        findings.append(finding)
        if finding.ok:
            sound.add(check.name)
    return PreflightReport(tuple(findings), tuple(not_run))


@dataclass(frozen=True)
class _Machine:
    """What the run asks of the machine; measured once for memory and disk."""

    policy: LeRobotFlowPolicy
    readers: Mapping[str, LeRobotReader]
    plan: ReplayPlan
    critic: nn.Module | None
    method: MethodConfig
    share: Share
    output_dir: Path
    num_checkpoints: int
    merged: bool
    prefixes: Callable[[], PrefixPlan]
    precision: Callable[[], AbstractContextManager[object]]

    @property
    def seen(self) -> FrameObservation:
        return next(iter(self.readers.values())).first_observation()

    @cached_property
    def dry(self) -> memory.DryPass:
        return memory.dry_pass(self.policy, self.seen, self.method, self.precision)

    @cached_property
    def memory(self) -> memory.Memory:
        chunks = self.plan.next_action_bytes(self.policy)
        return memory.measure_memory(
            self.policy,
            self.critic,
            self.dry,
            chunks,
            averages=self.method.keeps_average,
            shards=self.share.shards,
            contexts=self.prefixes().contexts,
        )

    def check_observation(self) -> Finding:
        tasks = sorted({text for reader in self.readers.values() for text in reader.tasks})
        return model.check_observation(self.policy, self.seen, tasks)

    def check_gradient(self) -> Finding:
        return memory.check_gradient(self.dry, self.policy)

    def check_memory(self) -> Finding:
        device = model.device_of(self.policy)
        available = memory.available_memory(device)
        return memory.check_memory(self.memory, available, self.share, device.type)

    def check_disk(self) -> Finding:
        needs = disk.measure_disk(
            self.policy,
            self.plan,
            self.critic,
            self.memory,
            frame_bytes=self.prefixes().frame_bytes,
            num_checkpoints=self.num_checkpoints,
            merged=self.merged,
            processes=self.share.processes,
        )
        return disk.check_disk(needs, self.plan.path, self.output_dir)

"""Where the prefixes of a run's frames come from: kept on the disk, or computed in each update.

A prefix is what the frozen vision-language part of a policy makes of an observation, megabytes a
frame at full size. The critic's features of it, kilobytes, are always kept.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from vla_trqam.data.feature_cache import PrefixCache
from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.data.frames import FrameObservation
from vla_trqam.errors import UserError
from vla_trqam.preflight.disk import existing
from vla_trqam.preflight.memory import in_words
from vla_trqam.preflight.model import repeated
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

GIB = 2**30
FREE_SHARE = 0.5
"""Of the free disk, what an automatic choice fills with prefixes at most."""
TIMED = 4
FEATURES_ONLY = "+features"
"""Ends the fingerprint of caches that hold no prefixes."""


@dataclass(frozen=True)
class PrefixCost:
    """What one frame's prefix costs.

    Attributes:
        size: bytes of everything that is kept of it.
        beside: bytes of what is kept where no prefix is: the critic's features and what else.
        seconds: of the pass that makes it.
    """

    size: int
    beside: int
    seconds: float


def measure_prefix(
    policy: LeRobotFlowPolicy,
    seen: FrameObservation,
    critic_features: tuple[str, ...],
    chunks: int,
) -> PrefixCost:
    """Of one raw observation (B = 1), by encoding a few of it.

    Args:
        policy: on its device.
        seen: the observation.
        critic_features: names of what the critic sees.
        chunks: bytes of the chunks kept beside these.
    """
    first = policy.packed(seen)
    several = repeated(seen, TIMED)
    begin = perf_counter()
    made = policy.packed(several)
    for tensor in made.values():  # a device may still be at work
        tensor.flatten()[:1].cpu()
    seconds = (perf_counter() - begin) / TIMED
    beside = chunks + sum(first[name].nbytes for name in critic_features)
    return PrefixCost(sum(made.nbytes for made in first.values()), beside, seconds)


@dataclass(frozen=True)
class PrefixPlan:
    """The choice, and what it costs.

    Attributes:
        kept: on the disk; otherwise they are computed in the policy's updates.
        draws_next: whether an update of the policy draws its batch's next actions, which takes the
            next frames' prefixes too.
        cost: of one frame.
        frames: of all processes' replays when they are full.
        processes: that share them.
    """

    kept: bool
    draws_next: bool
    cost: PrefixCost
    frames: int
    processes: int = 1

    @property
    def contexts(self) -> int:
        """Prefixes that an update holds of each row."""
        return 2 if self.draws_next else 1

    @property
    def frame_bytes(self) -> int:
        """Kept of every frame, next actions apart."""
        return self.cost.size if self.kept else self.cost.beside

    @property
    def needed(self) -> int:
        """Bytes of all frames' prefixes."""
        return self.frames * self.cost.size

    def finding(self) -> Finding:
        """What a reader is told of it."""
        each, every = in_words(self.cost.size), in_words(self.needed)
        how = (
            "kept on the disk"
            if self.kept
            else "computed in each update of the policy, of its batch; kept are "
            f"{in_words(self.cost.beside)} a frame for the critic"
        )
        seconds = _in_time(self.frames * self.cost.seconds / self.processes)
        return Finding(
            "prefixes",
            f"{each} a frame, {every} of {self.frames:,} frames: {how}; to encode all takes about "
            f"{seconds}, decoding and next actions come on top",
        )


def plan_prefixes(
    wanted: PrefixCache,
    budget_gib: float | None,
    cost: PrefixCost,
    *,
    frames: int,
    batch_size: int,
    replay: Path,
    draw_next: bool | None = None,
    processes: int = 1,
) -> PrefixPlan:
    """Whether all frames' prefixes are kept; a replay that was begun goes on as it began.

    Args:
        wanted: "disk" keeps them, "none" does not, "auto" does where the budget has room for all.
        budget_gib: of the prefixes of all frames; None for half of what is free.
        cost: of one frame.
        frames: of all processes' replays when they are full.
        batch_size: of the policy's updates.
        replay: its folder, which need not exist yet.
        draw_next: whether updates draw their next actions; None does where prefixes are kept.
        processes: that share the frames.

    Raises:
        UserError: the budget is too small for what is wanted, or for a single batch.
    """
    room = None if budget_gib is None else budget_gib * GIB
    needed = frames * cost.size
    if room is not None and room < batch_size * cost.size:
        raise UserError(
            f"--prefix_cache_gib={budget_gib:g} has no room for the prefixes of one batch, "
            f"{batch_size} of {in_words(cost.size)}: --prefix_cache=none keeps none, or give "
            f"{needed / GIB:.3g} for all {frames:,} frames"
        )
    if wanted == "disk" and room is not None and needed > room:
        raise UserError(
            f"--prefix_cache=disk keeps {in_words(needed)}, {frames:,} frames of "
            f"{in_words(cost.size)}, and --prefix_cache_gib={budget_gib:g} has no room for them: "
            f"give {needed / GIB:.3g}, or --prefix_cache=auto"
        )
    kept = _kept(wanted, needed, room, replay)
    return PrefixPlan(kept, kept if draw_next is None else draw_next, cost, frames, processes)


def _kept(wanted: PrefixCache, needed: int, room: float | None, replay: Path) -> bool:
    if wanted != "auto":
        return wanted == "disk"
    begun = CacheHeader.read(replay)
    if begun is not None:
        return not begun.fingerprint.endswith(FEATURES_ONLY)
    if room is None:
        room = FREE_SHARE * shutil.disk_usage(existing(replay)).free
    return needed <= room


def _in_time(seconds: float) -> str:
    for unit, size in (("s", 60.0), ("min", 60.0)):
        if seconds < 2 * size:
            return f"{seconds:.0f} {unit}"
        seconds /= size
    return f"{seconds:.1f} h"

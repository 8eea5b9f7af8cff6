"""What training will take of the disk, and what there is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from vla_trqam.data.frame_files import ImageShape
from vla_trqam.preflight.memory import Memory, in_words, module_bytes, tensor_bytes
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

NUMBER = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class ReplayPlan:
    """What the replay of one process will hold when it is full, rollouts to come among it.

    Attributes:
        path: its folder, which need not exist yet.
        steps: with a state, an action and a reward each.
        frames: with a picture of each camera, and the features that are kept of it.
        state_dim: S.
        action_dim: A.
        cameras: name -> (height, width, channels), uint8.
        next_actions: M, chunks of the policy kept at every frame.
        lent: of the frames, those whose pictures stay in their dataset.
    """

    path: Path
    steps: int
    frames: int
    state_dim: int
    action_dim: int
    cameras: Mapping[str, ImageShape]
    next_actions: int
    lent: int = 0

    def next_action_bytes(self, policy: LeRobotFlowPolicy) -> int:
        """``frames x M x n x a`` numbers: in memory, and in every checkpoint."""
        return self.frames * self.next_actions * policy.executed_size * NUMBER

    def bytes_with(self, kept: int) -> int:
        """On the disk, where what is kept of a frame beside its pictures takes so many bytes."""
        pictures = sum(
            height * width * channels for height, width, channels in self.cameras.values()
        )
        row = NUMBER * (self.state_dim + self.action_dim + 1)
        return (self.frames - self.lent) * pictures + self.frames * kept + self.steps * row

    @property
    def there(self) -> int:
        """Bytes that a run which is gone on with has written already."""
        files = self.path.rglob("*") if self.path.is_dir() else ()
        # Sparse files: what was never written has no blocks yet.
        return sum(512 * path.stat().st_blocks for path in files if path.is_file())


@dataclass(frozen=True)
class Disk:
    """Bytes still to be written.

    Attributes:
        checkpoints: all that a run keeps, and one whole policy exported at the end.
        replay: up to what it has room for, cached prefixes among it.
    """

    checkpoints: int
    replay: int


def measure_disk(
    policy: LeRobotFlowPolicy,
    plan: ReplayPlan,
    critic: nn.Module | None,
    memory: Memory,
    *,
    frame_bytes: int,
    num_checkpoints: int,
    merged: bool = False,
    processes: int = 1,
) -> Disk:
    """Each process has a replay like this one, and next actions of its own in every checkpoint.

    A checkpoint holds the policy as the host loads it (adapters without their base, unless they
    are ``merged``), what is trained of it (and its average), Adam's moments and the critic; a base
    that adapters alone need and that is in no file yet is written once.
    """
    whole, trained = module_bytes(policy.model), tensor_bytes(policy.trainable_parameters())
    saved = trained if policy.has_adapters and not merged else whole
    critics = 0 if critic is None else module_bytes(critic)
    moving = trained + memory.average + critics + memory.optimizer
    one = saved + moving + processes * memory.next_actions
    base = whole if policy.lacks_base and not merged else 0
    room = max(0, plan.bytes_with(frame_bytes) - plan.there)
    return Disk(num_checkpoints * one + whole + base, processes * room)


def check_disk(disk: Disk, replay: Path, output_dir: Path) -> Finding:
    """Free space where checkpoints and replay go."""
    output, kept = existing(output_dir), existing(replay)
    shared = output.stat().st_dev == kept.stat().st_dev
    needs = {output: disk.checkpoints + (disk.replay if shared else 0)}
    needs |= {} if shared else {kept: disk.replay}
    free = {folder: shutil.disk_usage(folder).free for folder in needs}
    free_words = ", ".join(f"{in_words(free[folder])} at {folder}" for folder in needs)
    written = f"checkpoints {in_words(disk.checkpoints)}, replay up to {in_words(disk.replay)} more"
    found = f"{written}; free {free_words}"
    short = [folder for folder in needs if needs[folder] > free[folder]]
    if short:
        lacking = ", ".join(f"{in_words(needs[f])} free at {f}" for f in short)
        return Finding.failure(
            "disk",
            found,
            f"{lacking}, or frames that stay in the dataset (--replay.frames=dataset), no prefixes "
            "(--prefix_cache=none), fewer --dataset.episodes, fewer --critic.next_actions or a "
            "larger --save_freq",
        )
    return Finding("disk", found)


def existing(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())

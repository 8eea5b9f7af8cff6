"""Checkpoints: ``checkpoints/000100/{pretrained_model,training_state,algorithm}`` and ``last``.

Safetensors and JSON only. A checkpoint is written beside its final name and renamed when it is
whole, so that a kill leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vla_trqam.errors import UserError
from vla_trqam.policy import FlowPolicy
from vla_trqam.training.learners import (
    Learner,
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
)

CHECKPOINTS = "checkpoints"
LAST = "last"
PRETRAINED, TRAINING, ALGORITHM = "pretrained_model", "training_state", "algorithm"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        phase: name of the phase under way.
        phase_step: updates done in it.
        step: off-policy updates done in all phases.
        replay_episodes: episodes in the replay.
        metrics_lines: lines in ``metrics.jsonl``.
        wall_clock: seconds spent so far, by phase.
    """

    phase: str
    phase_step: int
    step: int
    replay_episodes: int
    metrics_lines: int
    wall_clock: dict[str, float]


@dataclass
class Generators:
    """The two sources of randomness of a run: what is drawn from the replay, and noise."""

    replay: np.random.Generator
    noise: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> Generators:
        """Both from one seed."""
        return cls(np.random.default_rng(seed), torch.Generator(device).manual_seed(seed))


def save_checkpoint(
    output_dir: Path,
    name: str,
    learner: Learner,
    policy: FlowPolicy,
    generators: Generators,
    position: Position,
) -> Path:
    """Writes ``checkpoints/<name>`` and points ``last`` at it."""
    root = output_dir / CHECKPOINTS
    part = root / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    for folder in (PRETRAINED, TRAINING, ALGORITHM):
        (part / folder).mkdir(parents=True)
    policy.save_pretrained(part / PRETRAINED)
    save_file(module_tensors(learner), part / ALGORITHM / "networks.safetensors")
    _write_json(part / ALGORITHM / "scalars.json", learner.scalars())
    training = part / TRAINING
    save_file(optimizer_tensors(learner.optimizer), training / "optimizer_state.safetensors")
    save_file({"noise": generators.noise.get_state()}, training / "rng_state.safetensors")
    _write_json(training / "replay_rng.json", generators.replay.bit_generator.state)
    _write_json(training / "position.json", asdict(position))
    final = root / name
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _point(root / LAST, name)
    return final


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none."""
    last = output_dir / CHECKPOINTS / LAST
    return last.resolve() if last.exists() else None


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when it was saved."""
    return Position(**_read_json(checkpoint / TRAINING / "position.json"))


def load_checkpoint(checkpoint: Path, learner: Learner, generators: Generators) -> None:
    """Restores learner and generators to the bit.

    Raises:
        UserError: the checkpoint's weights are of other names or shapes than the learner's.
    """
    training = checkpoint / TRAINING
    try:
        load_module_tensors(learner, load_file(checkpoint / ALGORITHM / "networks.safetensors"))
    except (RuntimeError, FileNotFoundError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit this run's settings: {detail}") from None
    learner.load_scalars(_read_json(checkpoint / ALGORITHM / "scalars.json"))
    load_optimizer_tensors(learner.optimizer, load_file(training / "optimizer_state.safetensors"))
    generators.noise.set_state(load_file(training / "rng_state.safetensors")["noise"])
    generators.replay.bit_generator.state = _read_json(training / "replay_rng.json")


def _point(link: Path, target: str) -> None:
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    os.replace(part, link)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None

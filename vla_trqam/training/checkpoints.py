"""Checkpoints: ``checkpoints/000100/{pretrained_model,training_state,algorithm}`` and ``last``.

Safetensors and JSON only. A checkpoint is written beside its final name and renamed when it is
whole, so that a kill leaves the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
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


def check_output_dir(output_dir: Path, *, resume: bool) -> None:
    """Refuses a folder that a new run would overwrite.

    Raises:
        UserError: it is a file, or something is in it and the run is new.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir} is a file; a run needs a folder")
    if not resume and output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir} is in use; choose another --output_dir, or go on with that run "
            "by --resume=true"
        )


def save_checkpoint(
    output_dir: Path,
    name: str,
    learner: Learner,
    save_policy: Callable[[Path], None],
    generators: Generators,
    position: Position,
) -> Path:
    """Writes ``checkpoints/<name>`` and points ``last`` at it."""
    final = output_dir / CHECKPOINTS / name
    with written_whole(final) as part:
        for folder in (PRETRAINED, TRAINING, ALGORITHM):
            (part / folder).mkdir(parents=True)
        save_policy(part / PRETRAINED)
        save_file(module_tensors(learner), part / ALGORITHM / "networks.safetensors")
        _write_json(part / ALGORITHM / "scalars.json", learner.scalars())
        training = part / TRAINING
        save_file(optimizer_tensors(learner.optimizer), training / "optimizer_state.safetensors")
        save_file({"noise": generators.noise.get_state()}, training / "rng_state.safetensors")
        _write_json(training / "replay_rng.json", generators.replay.bit_generator.state)
        _write_json(training / "position.json", asdict(position))
    _point(final.with_name(LAST), name)
    return final


def forget_checkpoints(output_dir: Path, prefix: str, *, keep: str) -> None:
    """Deletes the checkpoints whose names begin so, but for the one named ``keep``."""
    for path in (output_dir / CHECKPOINTS).glob(f"{prefix}*"):
        if path.name != keep:
            shutil.rmtree(path)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none."""
    last = output_dir / CHECKPOINTS / LAST
    if last.is_dir():
        return last.resolve()
    # A kill between the first checkpoint and its link, or a copy that left the link out.
    whole = [path for path in last.parent.glob("[!.]*") if path.is_dir()]
    return max(whole, key=_age, default=None)


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when it was saved.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = checkpoint / TRAINING / "position.json"
    try:
        return Position(**_read_json(path))
    except TypeError as error:
        raise UserError(f"{path} does not say where a run stands: {error}") from None


def load_checkpoint(checkpoint: Path, learner: Learner, generators: Generators) -> None:
    """Restores learner and generators to the bit.

    Raises:
        UserError: a file is missing or damaged, or of another run's names or shapes.
    """
    training, algorithm = checkpoint / TRAINING, checkpoint / ALGORITHM
    try:
        load_module_tensors(learner, _read_tensors(algorithm / "networks.safetensors"))
        learner.load_scalars(_read_json(algorithm / "scalars.json"))
        moments = _read_tensors(training / "optimizer_state.safetensors")
        load_optimizer_tensors(learner.optimizer, moments)
        generators.noise.set_state(_read_tensors(training / "rng_state.safetensors")["noise"])
        generators.replay.bit_generator.state = _read_json(training / "replay_rng.json")
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit this run: {detail}") from None


def _age(checkpoint: Path) -> tuple[int, int]:
    position = read_position(checkpoint)
    return position.step, position.phase_step


def _point(link: Path, target: str) -> None:
    with written_whole(link) as part:
        part.symlink_to(target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None

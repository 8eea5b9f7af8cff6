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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.training.distributed import Team
from vla_trqam.training.generators import Generators
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
NETWORKS = "networks.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        phase: name of the phase under way.
        phase_step: updates done in it.
        step: off-policy updates done in all phases.
        replay_episodes: episodes in the replay of each process.
        metrics_lines: lines in ``metrics.jsonl``.
        wall_clock: seconds spent so far, by phase.
        precision: the launcher's mixed precision, "no" or "bf16".
    """

    phase: str
    phase_step: int
    step: int
    replay_episodes: list[int]
    metrics_lines: int
    wall_clock: dict[str, float]
    precision: str


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
    team: Team | None = None,
) -> Path:
    """Writes ``checkpoints/<name>`` and points ``last`` at it; every process of the team calls it.

    What differs from process to process lies in ``training_state/rank_1`` and so on.
    """
    team = team or Team()
    final = output_dir / CHECKPOINTS / name
    # Hidden, so that it is no checkpoint, until the main process puts it in place.
    others = final.with_name(f".{name}_ranks")
    team.together(lambda: None if team.is_main else _write_rank(others, team, learner, generators))

    def write() -> None:
        with written_whole(final) as part:
            for folder in (PRETRAINED, TRAINING, ALGORITHM):
                (part / folder).mkdir(parents=True)
            save_policy(part / PRETRAINED)
            save_file(module_tensors(learner), part / ALGORITHM / NETWORKS)
            _write_json(part / ALGORITHM / "scalars.json", learner.scalars())
            training = part / TRAINING
            moments = optimizer_tensors(learner.optimizer)
            save_file(moments, training / "optimizer_state.safetensors")
            _write_generators(training, generators)
            _write_json(training / "position.json", asdict(position))
            for rank in others.glob("*"):
                rank.rename(training / rank.name)
        shutil.rmtree(others, ignore_errors=True)
        _point(final.with_name(LAST), name)

    team.on_main(write)
    return final


def _write_rank(folder: Path, team: Team, learner: Learner, generators: Generators) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / _rank_name(team.rank)) as own:
        own.mkdir()
        save_file(module_tensors(learner, own=True), own / NETWORKS)
        _write_generators(own, generators)


def _rank_name(rank: int) -> str:
    return f"rank_{rank}"


def _write_generators(folder: Path, generators: Generators) -> None:
    save_file({"noise": generators.noise.get_state()}, folder / "rng_state.safetensors")
    _write_json(folder / "replay_rng.json", generators.replay.bit_generator.state)


def _read_generators(folder: Path, generators: Generators) -> None:
    generators.noise.set_state(_read_tensors(folder / "rng_state.safetensors")["noise"])
    generators.replay.bit_generator.state = _read_json(folder / "replay_rng.json")


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


def load_checkpoint(
    checkpoint: Path, learner: Learner, generators: Generators, rank: int = 0
) -> None:
    """Restores learner and generators of a process to the bit.

    Raises:
        UserError: a file is missing or damaged, or of another run's names or shapes.
    """
    training, algorithm = checkpoint / TRAINING, checkpoint / ALGORITHM
    own = training / _rank_name(rank) if rank else training
    try:
        tensors = _read_tensors(algorithm / NETWORKS)
        if rank:
            tensors |= _read_tensors(own / NETWORKS)
        load_module_tensors(learner, tensors)
        learner.load_scalars(_read_json(algorithm / "scalars.json"))
        moments = _read_tensors(training / "optimizer_state.safetensors")
        load_optimizer_tensors(learner.optimizer, moments)
        _read_generators(own, generators)
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

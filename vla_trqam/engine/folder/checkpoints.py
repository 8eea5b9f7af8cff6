"""Checkpoints: ``checkpoints/000100/{pretrained_model,training_state,algorithm}`` and ``last``.

Safetensors and JSON only. A checkpoint is written beside its final name and renamed when it is
whole and on the disk itself, so that a kill or a power cut leaves the one before. Its
``manifest.json`` has the checksums of its files, which loading verifies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_trqam.data.foreign import check_header
from vla_trqam.engine.folder.manifest import damage, write_manifest
from vla_trqam.engine.folder.state import (
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
)
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.engine.processes.team import Team
from vla_trqam.errors import UserError
from vla_trqam.files import discard, written_durably
from vla_trqam.methods.base import Method

CHECKPOINTS = "checkpoints"
LAST = "last"
PRETRAINED, TRAINING, ALGORITHM = "pretrained_model", "training_state", "algorithm"
VALUED = "critic.json"
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


def save_checkpoint(
    output_dir: Path,
    name: str,
    method: Method,
    save_policy: Callable[[Path], None],
    generators: Generators,
    position: Position,
    team: Team | None = None,
    valued: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``checkpoints/<name>`` and points ``last`` at it; every process of the team calls it.

    ``valued`` are the settings by which the critic's numbers mean something, told beside it.

    What differs from process to process lies in ``training_state/rank_1`` and so on.
    """
    team = team or Team()
    final = output_dir / CHECKPOINTS / name
    # Hidden, so that it is no checkpoint, until the main process puts it in place.
    others = final.with_name(f".{name}_ranks")
    team.together(lambda: None if team.is_main else _write_rank(others, team, method, generators))

    # Before the main process is alone: what is in parts, all processes put together.
    networks, moments = module_tensors(method), optimizer_tensors(method.optimizer)

    def write() -> None:
        with written_durably(final) as part:
            for folder in (PRETRAINED, TRAINING, ALGORITHM):
                (part / folder).mkdir(parents=True)
            save_policy(part / PRETRAINED)
            save_file(networks, part / ALGORITHM / NETWORKS)
            _write_json(part / ALGORITHM / "scalars.json", method.scalars())
            if valued:
                _write_json(part / ALGORITHM / VALUED, dict(valued))
            training = part / TRAINING
            save_file(moments, training / "optimizer_state.safetensors")
            _write_generators(training, generators)
            _write_json(training / "position.json", asdict(position))
            for rank in others.glob("*"):
                rank.rename(training / rank.name)
            write_manifest(part)
        shutil.rmtree(others, ignore_errors=True)
        _point(final.with_name(LAST), name)

    team.on_main(write)
    return final


def _write_rank(folder: Path, team: Team, method: Method, generators: Generators) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_durably(folder / _rank_name(team.rank)) as own:
        own.mkdir()
        save_file(module_tensors(method, own=True), own / NETWORKS)
        _write_generators(own, generators)


def _rank_name(rank: int) -> str:
    return f"rank_{rank}"


def _write_generators(folder: Path, generators: Generators) -> None:
    save_file({"noise": generators.noise.get_state()}, folder / "rng_state.safetensors")
    _write_json(folder / "replay_rng.json", generators.replay.bit_generator.state)


def _read_generators(folder: Path, generators: Generators) -> None:
    generators.noise.set_state(_read_tensors(folder / "rng_state.safetensors")["noise"])
    generators.replay.bit_generator.state = _read_json(folder / "replay_rng.json")


def adopt_checkpoint(checkpoint: Path, output_dir: Path) -> None:
    """Copies another run's checkpoint, which becomes this one's last."""
    (output_dir / CHECKPOINTS).mkdir(exist_ok=True)
    with written_durably(output_dir / CHECKPOINTS / checkpoint.name) as part:
        shutil.copytree(checkpoint, part)
    _point(output_dir / CHECKPOINTS / LAST, checkpoint.name)


def forget_checkpoints(output_dir: Path, prefix: str, *, keep: str) -> None:
    """Deletes the checkpoints whose names begin so, but for the one named ``keep``."""
    for path in (output_dir / CHECKPOINTS).glob(f"{prefix}*"):
        if path.name != keep:
            discard(path)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none."""
    last = output_dir / CHECKPOINTS / LAST
    if last.is_dir():
        return last.resolve()
    # A kill between the first checkpoint and its link, or a copy that left the link out.
    return max(all_checkpoints(output_dir), key=_age, default=None)


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint of a run, in the order of their names."""
    found = (output_dir / CHECKPOINTS).glob("[!.]*")
    return sorted(path for path in found if path.is_dir() and path.name != LAST)


def check_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint one of whose files is not what was written.

    Raises:
        UserError: with the file, and the newest checkpoint that is whole and how to take it.
    """
    wrong = damage(checkpoint)
    if wrong is None:
        return
    others = [path for path in all_checkpoints(checkpoint.parents[1]) if path != checkpoint]
    good = max((path for path in others if _is_good(path)), key=_age, default=None)
    if good is None:
        raise UserError(f"{wrong}, and no other checkpoint of the run is whole: begin a new run")
    raise UserError(
        f"{wrong}; the newest whole checkpoint is {good.name}: "
        f"--resume=true --checkpoint={good.name} goes on from it"
    )


def _is_good(checkpoint: Path) -> bool:
    try:
        read_position(checkpoint)
    except UserError:
        return False
    return damage(checkpoint) is None


def take_checkpoint(output_dir: Path, name: str) -> list[Path]:
    """Makes a checkpoint the last one, and returns those that came after it.

    Raises:
        UserError: there is none of that name, or it is damaged.
    """
    taken = named_checkpoint(output_dir, name)
    check_whole(taken)
    own = _age(taken)
    _point(output_dir / CHECKPOINTS / LAST, name)
    return [p for p in all_checkpoints(output_dir) if not _is_good(p) or _age(p) > own]


def named_checkpoint(output_dir: Path, name: str) -> Path:
    """The one of ``--checkpoint``.

    Raises:
        UserError: there is none of that name.
    """
    known = {path.name: path for path in all_checkpoints(output_dir)}
    if name not in known:
        there = ", ".join(known) or "none"
        raise UserError(
            f"--checkpoint={name} is not in {output_dir / CHECKPOINTS}: there are {there}"
        )
    return known[name]


def read_position(checkpoint: Path) -> Position:
    """Where the run stood when it was saved.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = checkpoint / TRAINING / "position.json"
    values = _read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} does not say where a run stands: it is no JSON object")
    try:
        return Position(**values)
    except TypeError as error:
        raise UserError(f"{path} does not say where a run stands: {error}") from None


def load_checkpoint(
    checkpoint: Path, method: Method, generators: Generators, rank: int = 0
) -> None:
    """Restores method and generators of a process to the bit, from a checkpoint that is whole.

    Raises:
        UserError: a file is missing or damaged, or of another run's names or shapes.
    """
    training, algorithm = checkpoint / TRAINING, checkpoint / ALGORITHM
    own = training / _rank_name(rank) if rank else training
    try:
        tensors = _read_tensors(algorithm / NETWORKS)
        if rank:
            tensors |= _read_tensors(own / NETWORKS)
        load_module_tensors(method, tensors)
        method.load_scalars(_read_json(algorithm / "scalars.json"))
        moments = _read_tensors(training / "optimizer_state.safetensors")
        load_optimizer_tensors(method.optimizer, moments)
        _read_generators(own, generators)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit this run: {detail}") from None


def load_networks(checkpoint: Path, method: Method, *, without: Collection[str] = ()) -> None:
    """Restores a method's weights, to act and not to be trained.

    Args:
        checkpoint: its folder.
        method: made like the run's.
        without: modules that stay as they are.

    Raises:
        UserError: the file is missing, or of another method's names or shapes.
    """
    path = checkpoint / ALGORITHM / NETWORKS
    check_header(path)
    try:
        load_module_tensors(method, _read_tensors(path), without=without)
    except (UserError, RuntimeError, KeyError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the settings of its run: {detail}") from None


def _age(checkpoint: Path) -> tuple[int, float, int]:
    position = read_position(checkpoint)
    # Updates of the phases before the policy's own are counted anew in each.
    return position.step, sum(position.wall_clock.values()), position.phase_step


def _point(link: Path, target: str) -> None:
    with written_durably(link) as part:
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

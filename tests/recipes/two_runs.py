"""Runs of the recipes for LeRobot's policies in two processes, as a launcher places them."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import Place, fork_two
from safetensors.torch import load_file, save_file
from toy_images import images_state
from vla_runs import main

from vla_trqam.engine import finetune as engine
from vla_trqam.engine import launch
from vla_trqam.engine.cached import TrainedWeights
from vla_trqam.engine.run import Run

Prepare = Callable[[pytest.MonkeyPatch, int], None]


@dataclass
class Two:
    """What two processes left.

    Attributes:
        folder: the run's.
        notes: what each of them knew and said.
    """

    folder: Path
    notes: Path

    def status(self, rank: int) -> int:
        return int((self.notes / f"status.{rank}").read_text())

    def said(self, rank: int) -> str:
        return (self.notes / f"said.{rank}").read_text()

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        return load_file(self.notes / f"weights.{rank}.safetensors")

    def state(self) -> dict[str, Any]:
        """Everything that two equal runs must agree on to the bit."""
        found = {}
        for rank, replay in enumerate(("replay", "replay_1")):
            state = images_state(self.folder, replay)
            found |= {f"{rank} {name}": value for name, value in state.items()}
        own = self.folder / "checkpoints/last/training_state/rank_1"
        return found | {path.name: path.read_bytes() for path in own.iterdir()}


def run_rank(place: Place, flags: list[str], notes: Path, prepare: Prepare) -> None:
    rank, said = place.team.rank, io.StringIO()

    def remember(run: Run, *arguments: Any, **settings: Any) -> None:
        weights = {k: v.detach() for k, v in TrainedWeights(run.policy).state_dict().items()}
        save_file(weights, notes / f"weights.{rank}.safetensors")
        conclude(run, *arguments, **settings)

    conclude = engine.conclude
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(engine, "conclude", remember)
        patch.setattr(launch, "MAIN_ENDS_WITHIN", 0.0)
        prepare(patch, rank)
        status = main(*flags)
    (notes / f"status.{rank}").write_text(str(status))
    (notes / f"said.{rank}").write_text(said.getvalue())


def undisturbed(patch: pytest.MonkeyPatch, rank: int) -> None:
    pass


def two_run(folder: Path, *flags: str, prepare: Prepare = undisturbed) -> Two:
    notes = folder.with_name(folder.name + "_notes")
    notes.mkdir(exist_ok=True)
    arguments = [*flags, f"--output_dir={folder}"]
    fork_two(partial(run_rank, flags=arguments, notes=notes, prepare=prepare))
    return Two(folder, notes)

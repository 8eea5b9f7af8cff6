"""The short runs that the faults befall, and how one of them is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).with_name("hook.py")
PACKED = ROOT / "vla_trqam" / "data" / "lift_pi0"

Kind = Literal["state", "image"]
KINDS: tuple[Kind, ...] = ("state", "image")

SHARED = [
    "--save_freq=5",
    "--log_freq=1",
    "--num_threads=1",
    "--critic.ensemble_size=2",
    "--online.episodes_per_round=2",
    "--online.updates_per_round=20",
    "--eval.episodes=2",
    "--eval.episodes_during_training=2",
    "--eval.max_episode_steps=16",
    "--eval.num_workers=2",
    "--eval.videos=0",
]
STATE = [
    "--pretrain.steps=40",
    "--pretrain.batch_size=32",
    "--pretrain.num_demos=4",
    "--batch_size=32",
    "--policy.hidden_dims=[64,64]",
    "--critic.hidden_dims=[64,64]",
    "--base_episodes=3",
    "--critic.warmup_steps=20",
    "--steps=40",
    "--online.steps=40",
    "--evaluate_every=20",
]
IMAGE = [
    "--preset=default",
    f"--policy.path={PACKED / 'policy'}",
    "--dataset.repo_id=local/packed",
    f"--dataset.root={PACKED / 'dataset'}",
    "--dataset.episodes=[0,1,2]",
    "--peft.method=lora",
    "--peft.r=2",
    "--batch_size=4",
    "--steps=20",
    "--base_episodes=2",
    "--critic.warmup_steps=20",
    "--critic.updates_per_step=2",
    "--critic.batch_size=8",
    "--critic.next_actions=2",
    "--critic.hidden_dims=[16]",
    "--online.steps=20",
    "--evaluate_every=10",
]
RECIPES = {"state": "finetune_robomimic.py", "image": "finetune_pi0.py"}
FLAGS = {"state": [*STATE, *SHARED], "image": [*IMAGE, *SHARED]}


@dataclass(frozen=True)
class ShortRun:
    """A run of one kind in one folder.

    Attributes:
        kind: "state" is an MLP policy on Robomimic's states, "image" a tiny pi0 on images.
        folder: of the run; output of its programs goes beside it.
    """

    kind: Kind
    folder: Path

    @property
    def log(self) -> Path:
        """What its programs said."""
        return self.folder.with_suffix(".log")

    def start(
        self,
        flags: Sequence[str] = (),
        *,
        fault: dict[str, Any] | None = None,
        launcher: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Begins the run.

        Args:
            flags: beside its settings.
            fault: see `failing.hook.Fault`; None for none.
            launcher: by `accelerate launch`, as users do.
        """
        return self._program([*FLAGS[self.kind], *flags], fault, launcher)

    def resume(self) -> subprocess.Popen[bytes]:
        """Goes on with it."""
        return self._program(["--resume=true"], None, launcher=False)

    def _program(
        self, flags: Sequence[str], fault: dict[str, Any] | None, launcher: bool
    ) -> subprocess.Popen[bytes]:
        recipe = [str(ROOT / "recipes" / RECIPES[self.kind]), *flags]
        hook = (
            [] if fault is None else [str(HOOK), json.dumps({"folder": str(self.folder)} | fault)]
        )
        start = [sys.executable]
        if launcher:
            start = [*start, "-m", "accelerate.commands.launch", "-q"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*start, *hook, *recipe, f"--output_dir={self.folder}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far."""
        path = self.folder / "metrics.jsonl"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

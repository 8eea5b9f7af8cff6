r"""A run of a recipe with a policy of real size, from the command to the checkpoint.

    python benchmarks/whole_run.py --policy smolvla --folder /tmp/smolvla
    python benchmarks/whole_run.py --policy pi0 --folder /tmp/pi0 -- --policy.cuda_graphs=true
    python benchmarks/whole_run.py --policy smolvla --device cpu --episodes 2 --length 20 \
        --cameras 1 --updates 2 --folder /tmp/small -- --batch_size=2

Writes a stock checkpoint with random weights (real_size.py) and a LeRobotDataset of noise, and runs
its recipe on them offline, without cached prefixes, in a process of its own. Prints what
every part takes, the preflight's count of memory beside what was in use at most, and the size of
what was saved. What stands after ``--`` is passed on to the recipe.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from large_dataset import ACTION as ACTION_DIM
from large_dataset import CAMERAS, STATE, write_filmed
from vla_costs.real_size import PALIGEMMAS, REAL, real_config, write_real_checkpoint
from vla_trqam.adapters.tiny.checkpoints import flow_features

from vla_trqam.errors import UserError

SIDE = 224
INPUTS = ("policy", "device", "dtype", "cameras", "episodes", "length")
EXECUTED, FLOW_STEPS = 10, 4
GIB, MIB = 2**30, 2**20
RECIPES = {"pi0": "finetune_pi0", "pi05": "finetune_pi0", "smolvla": "finetune_smolvla"}
CHILD = """
import atexit, runpy, torch
def most():
    print("most", torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)
atexit.register(most)
runpy.run_module("vla_trqam.recipes.{recipe}", run_name="__main__", alter_sys=True)
"""
"""The recipe, and at its end what the device held at most."""
MARKS = {
    "machine": "ok    parameters",
    "data": "ok    base  ",
    "critic": "critic: ",
    "policy": "offline: ",
}
"""What the run says when a part is over: the preflight without data, that of the data, updates."""


@dataclass
class Told:
    """What the run said, and when.

    Attributes:
        seconds: since the command, by part of :data:`MARKS`.
        memory: the preflight's count, in its words.
        most: bytes of the device at most; 0 without CUDA.
        lines: everything.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: str = ""
    most: int = 0
    lines: list[str] = field(default_factory=list)

    def hear(self, line: str, seconds: float) -> None:
        """Takes a line."""
        self.lines.append(line)
        for part, mark in MARKS.items():
            if line.startswith(mark):
                self.seconds[part] = seconds
        if line.startswith("ok    memory"):
            self.memory = line.removeprefix("ok    memory").strip()
        if found := re.search(r"most (\d+)$", line.rstrip()):
            self.most = int(found[1])


def run(recipe: str, flags: list[str]) -> Told:
    """The recipe in a process of its own.

    Raises:
        SystemExit: it failed; with its last words.
    """
    command = [sys.executable, "-P", "-u", "-c", CHILD.format(recipe=recipe), *flags]
    begin, told = time.perf_counter(), Told()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdout is not None
    for line in process.stdout:
        told.hear(line, time.perf_counter() - begin)
    if process.wait() != 0 or told.seconds.keys() != MARKS.keys():
        raise SystemExit("".join(told.lines[-20:]))
    told.seconds["end"] = time.perf_counter() - begin
    return told


def write_inputs(given: argparse.Namespace) -> None:
    """Checkpoint and dataset, where they are not there.

    Raises:
        UserError: the folder has others, or a part of them.
    """
    wanted = {name: getattr(given, name) for name in INPUTS}
    made = given.folder / "inputs.json"
    if made.exists():
        if (there := json.loads(made.read_text())) != wanted:
            raise UserError(f"--folder={given.folder} was made with {there}: take another")
        return
    if given.folder.exists():
        raise UserError(f"--folder={given.folder} is there and has no {made.name}: take another")
    given.folder.mkdir(parents=True)
    cameras = CAMERAS[: given.cameras]
    features = flow_features(STATE, ACTION_DIM, cameras, SIDE)
    config = real_config(
        given.policy, features, given.folder, device=given.device, dtype=given.dtype
    )
    write_real_checkpoint(config, features, given.folder / "policy")
    write_filmed(
        given.folder / "dataset",
        cameras=cameras,
        side=SIDE,
        episodes=given.episodes,
        length=given.length,
        use_videos=False,
    )
    made.write_text(json.dumps(wanted))


def flags_of(given: argparse.Namespace) -> list[str]:
    """Of the recipe."""
    folder = given.folder
    return [
        f"--policy.path={folder / 'policy'}",
        "--dataset.repo_id=local/large",
        f"--dataset.root={folder / 'dataset'}",
        f"--output_dir={folder / 'run'}",
        *("--prefix_cache=none", "--replay.frames=copy", "--env.type=null"),
        *("--online.steps=0", "--base_episodes=0", "--eval.videos=0", "--evaluate_every=0"),
        f"--policy.n_action_steps={EXECUTED}",
        f"--policy.tuned_flow_steps={FLOW_STEPS}",
        f"--steps={given.updates}",
        f"--critic.warmup_steps={given.critic_updates}",
        *("--log_freq=5", "--save_freq=100000"),
        *given.flags,
    ]


def report(given: argparse.Namespace, told: Told) -> str:
    """A Markdown table and the preflight's words."""
    output = given.folder / "run"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rates = {row["phase"]: row["updates_per_s"] for row in rows}
    saved = output / "checkpoints/last/pretrained_model"
    weights = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    frames = given.episodes * given.length
    cells = {
        "policy": f"{given.policy}, {given.cameras} cameras",
        "machine checked, s": f"{told.seconds['machine']:.0f}",
        "data checked, s": f"{told.seconds['data']:.0f}",
        f"{frames} frames encoded, critic warm, s": (
            f"{told.seconds['critic'] - told.seconds['data']:.0f}"
        ),
        "critic, updates/s": f"{rates['critic']:.1f}",
        "policy, updates/s": f"{rates['offline']:.2f}",
        "whole run, s": f"{told.seconds['end']:.0f}",
        "at most, GiB": f"{told.most / GIB:.1f}",
        "saved, MiB": f"{weights / MIB:.0f}",
    }
    table = [cells.keys(), ["---"] * len(cells), cells.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + f"\n\nmemory: {told.memory}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=REAL, default="smolvla")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of pi0 and pi05")
    parser.add_argument("--cameras", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--length", type=int, default=100, help="steps of an episode")
    parser.add_argument("--updates", type=int, default=30, help="of the policy")
    parser.add_argument("--critic_updates", type=int, default=200, help="before")
    parser.add_argument("--folder", type=Path, required=True, help="gets checkpoint, data and run")
    parser.add_argument("--only_inputs", action="store_true", help="writes them and runs nothing")
    parser.add_argument("flags", nargs="*", help="after --, of the recipe")
    given = parser.parse_args()
    if given.policy not in PALIGEMMAS and given.dtype is not None:
        parser.error(f"--dtype={given.dtype}: the config of {given.policy} has no dtype")
    given.dtype = given.dtype or "bfloat16"
    try:
        write_inputs(given)
    except UserError as error:
        parser.error(str(error))
    torch.cuda.empty_cache()
    if given.only_inputs:
        return
    print(report(given, run(RECIPES[given.policy], flags_of(given))))


if __name__ == "__main__":
    main()

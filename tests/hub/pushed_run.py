"""The folder of a run as a recipe for LeRobot's policies leaves it, made in milliseconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from vla_trqam.engine.folder.checkpoints import Position
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.page import write_report

COMMAND = "accelerate launch recipes/finetune_pi0.py --policy.path=lab/pi0 --seed=3"
SUCCESSES = {"both": 20, "tuned_only": 12, "base_only": 2, "neither": 16}
CONFIG: dict[str, Any] = {
    "seed": 3,
    "policy": {"path": "lab/pi0"},
    "dataset": {"repo_id": "lab/rollouts", "root": None},
    "method": {"name": "trqam"},
    "trqam": {"kl_budget": 0.5, "kl_per_action": False},
    "env": {
        "type": "robomimic",
        "task": "Lift",
        "cameras": ["agentview"],
        "image_size": 96,
        "shadows": False,
    },
    "eval": {"episodes": 50, "first_seed": 10000, "max_episode_steps": 150},
}


def evaluation(first_seed: int = 10000) -> PairedEvaluation:
    """Newcombe's own example: 32 of 50 against 22, difference 0.2, interval 0.0562 to 0.3292."""
    both, tuned_only, base_only, neither = SUCCESSES.values()
    base = [True] * both + [False] * tuned_only + [True] * base_only + [False] * neither
    tuned = [True] * (both + tuned_only) + [False] * (base_only + neither)
    count = len(base)
    seeds = np.arange(first_seed, first_seed + count)
    return PairedEvaluation(seeds, base, tuned, np.full(count, 9), np.full(count, 8))


def write_run(folder: Path, *, finished: bool = True, config: dict[str, Any] | None = None) -> Path:
    """A run with checkpoints after 50 and 100 updates; the KL reaches its budget at 60."""
    folder.mkdir()
    config = CONFIG if config is None else config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(10, 101, 10):
            kl = 0.5 if step >= 70 else 0.3
            values = {"kl_ema": kl, "kl_budget": 0.5, "lam": 2.0 + step / 100}
            log.log(step, "offline", values | {"lam_min": 0.01, "lam_max": 100.0})
    for step in (50, 100):
        write_checkpoint(folder / "checkpoints" / f"{step:06d}", step)
    (folder / "checkpoints/last").symlink_to("000100")
    (folder / "plots").mkdir()
    for name in ("kl", "success"):
        (folder / "plots" / f"{name}.png").write_bytes(name.encode() * 50)
    if finished:
        _report(folder, config)
    return folder


def write_checkpoint(folder: Path, step: int) -> None:
    policy, algorithm, training = (
        folder / name for name in ("pretrained_model", "algorithm", "training_state")
    )
    for part in (policy, algorithm, training):
        part.mkdir(parents=True)
    (policy / "config.json").write_text(json.dumps({"type": "pi0", "license": None}))
    for name in ("policy_preprocessor", "policy_postprocessor"):
        (policy / f"{name}.json").write_text(json.dumps({"name": name, "steps": []}))
    save_file({"weight": torch.full((100,), float(step))}, policy / "model.safetensors")
    save_file({"critic.weight": torch.ones(3) * step}, algorithm / "networks.safetensors")
    (algorithm / "scalars.json").write_text(json.dumps({"lam": 3.0}))
    (training / "optimizer_state.safetensors").write_bytes(b"not to be pushed")
    position = Position("offline", step, step, [9], step // 10, {"offline": 60.0}, "no")
    (training / "position.json").write_text(json.dumps(asdict(position)))


def _report(folder: Path, config: dict[str, Any]) -> None:
    write_report(
        folder,
        config=config,
        evaluation=evaluation(),
        metrics_path=folder / "metrics.jsonl",
        step=100,
        wall_clock={"offline": 60.0},
        title="TRQAM of pi0 on Lift",
        seeds={"training": 3},
        command=COMMAND,
        kl_unit="nats per chunk",
    )


def make_adapter(run: Path, base: str) -> None:
    """Turns the last checkpoint into LoRA adapters of ``base``."""
    policy = run / "checkpoints/last/pretrained_model"
    (policy / "model.safetensors").rename(policy / "adapter_model.safetensors")
    fields = {"base_model_name_or_path": base, "peft_type": "LORA"}
    (policy / "adapter_config.json").write_text(json.dumps(fields))

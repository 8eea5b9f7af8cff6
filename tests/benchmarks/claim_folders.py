"""Small run folders for the claims' scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.page import write_json

STATES, LINES = 20, 40


def make_run(
    folder: Path,
    *,
    method: dict[str, Any],
    tuned: int | None = 16,
    kl: Sequence[float] = (0.5,) * LINES,
    loss: Sequence[float] = (100.0,) * LINES,
    lam: Sequence[float] = (1.0,) * LINES,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run whose base solves 10 of 20 states; it diverged where ``tuned`` is None."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "steps": LINES,
        "method": method,
        "critic": {"ensemble_size": 4, "gradient_noise": 0.0},
        "dataset": {"path": None, "num_demos": None},
        **(settings or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for number, rate in enumerate((0.5, 0.3, 0.7)):
            log.log(10 * number, "eval", {"success_rate": rate, "episodes": 10})
        for step, (value, single, weight) in enumerate(zip(kl, loss, lam, strict=True)):
            values = {"kl_estimate": value, "kl_ema": value, "lam": weight, "adjoint_loss": single}
            bracket = {"kl_budget": method.get("kl_budget", 0.5), "lam_min": 0.1, "lam_max": 10.0}
            log.log(step, "offline", values | bracket)
    if tuned is not None:
        _finish(folder, tuned, seed)
    else:
        (folder / DIVERGED_NAME).write_text("training has diverged\n")
    return folder


def _finish(folder: Path, tuned: int, seed: int) -> None:
    number, every = np.arange(STATES), np.full(STATES, 60)
    success = number < 10, number >= STATES - tuned
    evaluation = PairedEvaluation(10_000 + number, *success, every, every)
    write_json(folder / "evaluation.json", evaluation.to_json())
    provenance = {
        "command": "python recipes/finetune_robomimic.py",
        "seeds": {"training": seed},
        "commit": None,
        "versions": {"torch": "2.11.0"},
        "machine": {"cpu_cores": 2},
    }
    report = {"title": "A on Lift", "wall_clock_seconds": {}, "provenance": provenance}
    write_json(folder / "report.json", report)

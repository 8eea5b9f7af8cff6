"""Golden files at any size, written with the slow reference."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_update import (
    EDIT,
    EDIT_ALPHA,
    NETWORKS,
    Learner,
    as_double,
    read_learner,
    read_update,
    update,
)
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The sizes of a made-up golden file; `settings` go over the defaults of `config_of`."""

    agent: str = "trqam"
    observation_dim: int = 5
    batch_size: int = 6
    updates: int = 2
    invalid_rows: tuple[int, ...] = ()
    weight_scale: float = 1.0
    reward_scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


def config_of(problem: Problem) -> dict[str, Any]:
    common = {
        "agent_name": problem.agent,
        "action_chunking": True,
        "action_dim": 3,
        "actor_hidden_dims": [32, 32],
        "actor_layer_norm": False,
        "batch_size": problem.batch_size,
        "best_of_n": 1,
        "clip_adj": True,
        "clip_grad": True,
        "discount": 0.995,
        "flow_steps": 10,
        "horizon_length": 2,
        "lr": 3e-4,
        "num_qs": 4,
        "ob_dims": [problem.observation_dim],
        "rho": 0.5,
        "target_actor": True,
        "tau": 0.005,
        "use_target_grad": True,
        "value_hidden_dims": [32, 32],
        "value_layer_norm": True,
    }
    dual = {
        "eta_lambda": 0.01,
        "kl_budget": 0.5,
        "kl_clip_coef": 2.0,
        "kl_ema_coef": 0.1,
        "lam_scale": 3.0,
        "lambda_max": 100.0,
        "lambda_min": 0.01,
    }
    qam = {"inv_temp": 3.0, "residual": False, "fql_alpha": 0.0, "edit_scale": 0.0}
    qam |= {"edit_target_entropy": -3.0}
    return common | (dual if problem.agent == "trqam" else qam) | problem.settings


def random_weights(problem: Problem, config: dict[str, Any], rng: np.random.Generator) -> dict:
    """Initial arrays under `init/`; the actors differ, so that the KL is not zero."""
    flat = config["action_dim"] * config["horizon_length"]
    actor = [problem.observation_dim + flat + 1, *config["actor_hidden_dims"], flat]
    value = [problem.observation_dim + flat, *config["value_hidden_dims"], 1]
    arrays: dict[str, np.ndarray] = {}
    for name, network in NETWORKS.items():
        is_critic = name in ("critic", "target")
        widths, lead = (value, (config["num_qs"],)) if is_critic else (actor, ())
        norm = config["value_layer_norm" if is_critic else "actor_layer_norm"]
        arrays |= random_network(rng, network, widths, lead, norm=norm, scale=problem.weight_scale)
    if config.get("edit_scale"):
        arrays |= squashed_gaussian(rng, EDIT, [value[0], *config["actor_hidden_dims"]], flat)
        arrays[f"{EDIT_ALPHA}/log_value"] = np.array(0.2)
    return {f"init/{k}": v.astype(np.float32) for k, v in arrays.items()}


def squashed_gaussian(
    rng: np.random.Generator, name: str, widths: list[int], size: int
) -> dict[str, np.ndarray]:
    """A Gaussian's trunk of these widths, and its two heads."""
    trunk = random_network(rng, f"{name}/MLP_0", widths, (), norm=False)
    heads: dict[str, np.ndarray] = {}
    for end in ("Mean", "LogStd"):
        head = random_network(rng, "head", [widths[-1], size], (), norm=False)
        heads |= {f"{name}/OutputDense{end}/{k.rpartition('/')[2]}": v for k, v in head.items()}
    return trunk | heads


def random_network(
    rng: np.random.Generator,
    name: str,
    widths: list[int],
    lead: tuple[int, ...],
    *,
    norm: bool,
    scale: float = 1.0,
) -> dict[str, np.ndarray]:
    """One network's arrays by the file's keys."""
    arrays: dict[str, np.ndarray] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        kernel = rng.normal(size=(*lead, fan_in, fan_out)) * scale
        arrays[f"{name}/Dense_{i}/kernel"] = kernel / fan_in**0.5
        arrays[f"{name}/Dense_{i}/bias"] = 0.1 * rng.normal(size=(*lead, fan_out))
        if norm and i < len(widths) - 2:
            arrays[f"{name}/LayerNorm_{i}/scale"] = 1.0 + 0.1 * rng.normal(size=(*lead, fan_out))
            arrays[f"{name}/LayerNorm_{i}/bias"] = 0.1 * rng.normal(size=(*lead, fan_out))
    return arrays


def random_update(problem: Problem, config: dict[str, Any], rng: np.random.Generator) -> dict:
    """One update's batch and noise, by their keys after `u<n>/`."""
    size, horizon, dim = problem.batch_size, config["horizon_length"], config["action_dim"]
    flat, steps = horizon * dim, config["flow_steps"]
    valid = np.ones((size, horizon))
    valid[list(problem.invalid_rows), horizon // 2 :] = 0.0
    arrays: dict[str, np.ndarray] = {
        "batch/observations": rng.normal(size=(size, problem.observation_dim)),
        "batch/actions": rng.uniform(-1, 1, size=(size, horizon, dim)),
        "batch/next_observations": rng.normal(size=(size, horizon, problem.observation_dim)),
        "batch/rewards": rng.normal(size=(size, horizon)),
        "batch/masks": (rng.uniform(size=(size, horizon)) > 0.3).astype(float),
        "batch/valid": valid,
        "batch/terminals": np.zeros((size, horizon)),
    }
    draws = {
        "next_action": rng.normal(size=(size, flat)),
        "bc_x0": rng.normal(size=(size, flat)),
        "bc_t": rng.uniform(size=(size, 1)),
        "sde_x0": rng.normal(size=(size, flat)),
        "sde_steps": rng.normal(size=(steps, size, flat)),
    }
    if problem.agent == "trqam":
        arrays |= {f"noise/{k}": v for k, v in draws.items()}
    else:
        drawn = [draws["next_action"][:, None], draws["bc_x0"], draws["bc_t"], draws["sde_x0"]]
        drawn.extend(draws["sde_steps"])
        if config["edit_scale"]:
            drawn.insert(1, rng.normal(size=(flat, size, 1)))
            drawn += [rng.normal(size=(size, flat)), rng.normal(size=(flat, size))]
        for i, draw in enumerate(drawn):
            kind = "uniform" if draw.shape == (size, 1) else "normal"
            arrays[f"draw/{i:02d}_{kind}"] = draw
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def write_golden(path: Path, problem: Problem, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a golden file and returns what is in it."""
    rng = np.random.default_rng(seed)
    config = config_of(problem)
    data = random_weights(problem, config, rng)
    data["config.json"] = np.frombuffer(json.dumps(config).encode(), dtype=np.uint8)
    learner = read_learner(data)
    for number in range(problem.updates):
        data |= {f"u{number}/{k}": v for k, v in random_update(problem, config, rng).items()}
        record = update(learner, *read_update(data, number))
        data |= {f"u{number}/{k}": to_array(v) for k, v in record.items()}
    data |= {f"final/{k}": to_array(v) for k, v in learner.weights.items()}
    if problem.agent == "trqam":
        data |= evaluation(learner, rng)
    np.savez(path, **data)
    return data


def evaluation(learner: Learner, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The final policy's ODE actions."""
    config = learner.config
    obs = rng.normal(size=(4, *config["ob_dims"])).astype(np.float32)
    flat = config["action_dim"] * config["horizon_length"]
    noise = rng.normal(size=(4, flat)).astype(np.float32)
    actions = learner.ode_action(as_double(obs), as_double(noise))
    return {"eval/obs": obs, "eval/noise": noise, "eval/actions": to_array(actions)}


def to_array(value: Tensor | float) -> np.ndarray:
    return torch.as_tensor(value).detach().numpy().astype(np.float32)

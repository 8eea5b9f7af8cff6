"""Golden files of FQL, IFQL, DSRL and CGQL: read for the slow reference, and written with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_files import Problem, random_network, squashed_gaussian, to_array
from reference_baselines import (
    CRITIC,
    FIELD,
    GUIDED_FIELD,
    NOISE_ACTOR,
    NOISE_CRITIC,
    ONE_STEP,
    SLOW_FIELD,
    TARGET,
    TEMPERATURE,
    TIMED_CRITIC,
    TIMED_TARGET,
    VALUE,
    Reference,
    Row,
    update,
)
from reference_update import Weights, as_double

DRAWS = {
    "fql": ("next", "bc_x_0", "bc_tau", "distill"),
    "ifql": ("bc_x_0", "bc_tau"),
    "dsrl": ("next", "distill", "bc_x_0", "bc_tau", "actor"),
    "cgql": ("next", "noisy_tau", "noisy_x_0", "bc_x_0", "bc_tau"),
}
NUMBERS_FIRST = {"dsrl": ("next", "actor")}
"""Draws of the noise actor have the batch as their second axis."""
KNOBS: dict[str, dict[str, Any]] = {
    "fql": {"alpha": 10.0},
    "ifql": {"kappa": 0.9, "num_samples": 32},
    "dsrl": {"noise_scale": 1.0, "target_entropy": -3.0},
    "cgql": {
        **{"mode": "linex", "inv_temp": 1.0, "guidance_coef": 0.2, "noisy_coef": 0.1},
        **{"isd_clip": 5.0, "separate": False, "target_guidance": True},
    },
}


def draws_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of an update's draws, in order."""
    names = DRAWS[config["agent_name"]]
    if config.get("mode") == "simple":  # which never sees a noisy chunk
        return tuple(name for name in names if not name.startswith("noisy_"))
    return names


def config_of(problem: Problem) -> dict[str, Any]:
    common = {
        "agent_name": problem.agent,
        "action_chunking": True,
        "action_dim": 3,
        "actor_hidden_dims": [32, 32],
        "actor_layer_norm": False,
        "best_of_n": 1,
        "discount": 0.995,
        "flow_steps": 10,
        "horizon_length": 2,
        "lr": 3e-4,
        "num_qs": 4,
        "rho": 0.5,
        "tau": 0.005,
        "value_hidden_dims": [32, 32],
        "value_layer_norm": True,
    }
    return common | KNOBS[problem.agent] | problem.settings


def random_weights(problem: Problem, config: dict[str, Any], rng: np.random.Generator) -> Weights:
    """Initial arrays of every network by the file's keys without `init/`, float32."""
    seen, flat = problem.observation_dim, config["action_dim"] * config["horizon_length"]
    actor, value = config["actor_hidden_dims"], config["value_hidden_dims"]
    heads, critic = (config["num_qs"],), [seen + flat, *value, 1]
    norms = {"actor": config["actor_layer_norm"], "value": config["value_layer_norm"]}
    field = ([seen + flat + 1, *actor, flat], (), norms["actor"])
    shapes = {FIELD[problem.agent]: field}
    critics = (CRITIC, TARGET)
    if problem.agent == "cgql":
        critic, critics = [seen + flat + 1, *value, 1], (TIMED_CRITIC, TIMED_TARGET)
        shapes[GUIDED_FIELD] = field
    shapes |= {name: (critic, heads, norms["value"]) for name in critics}
    if problem.agent == "fql":
        shapes[ONE_STEP] = ([seen + flat, *actor, flat], (), norms["actor"])
    elif problem.agent == "ifql":
        shapes[VALUE] = ([seen, *value, 1], (), norms["value"])
    elif problem.agent == "dsrl":
        shapes |= {SLOW_FIELD: field, NOISE_CRITIC: (critic, heads, norms["value"])}
    arrays: dict[str, np.ndarray] = {}
    for name, (widths, lead, norm) in shapes.items():
        arrays |= random_network(rng, name, widths, lead, norm=norm, scale=problem.weight_scale)
    if problem.agent == "dsrl":
        arrays |= squashed_gaussian(rng, NOISE_ACTOR, [seen, *actor], flat)
        arrays[f"{TEMPERATURE}/log_value"] = np.array(0.2)
    return {k: as_double(v.astype(np.float32)) for k, v in arrays.items()}


def random_draws(
    problem: Problem, config: dict[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Every random number of an update by name, (B, F) each and times (B, 1), float32."""
    shape = (problem.batch_size, config["action_dim"] * config["horizon_length"])
    return {
        name: (
            rng.uniform(size=(shape[0], 1)) if name.endswith("_tau") else rng.normal(size=shape)
        ).astype(np.float32)
        for name in draws_of(config)
    }


def read_reference(data: dict[str, np.ndarray]) -> Reference:
    """The state before update 0 of a golden file."""
    config = json.loads(bytes(data["config.json"]).decode())
    weights = {
        k.removeprefix("init/"): as_double(v) for k, v in data.items() if k.startswith("init/")
    }
    return Reference(config["agent_name"], config, weights)


def read_update(
    ours: Reference, data: dict[str, np.ndarray], number: int
) -> tuple[list[Row], Weights]:
    """Rows and draws of one update; the last step's entries are the whole chunk's."""
    prefix, steps = f"u{number}/", ours.config["horizon_length"]

    def get(name: str) -> torch.Tensor:
        return as_double(data[f"{prefix}batch/{name}"])

    rows = [
        Row(
            observation=get("observations")[b],
            action=get("actions")[b].flatten(),
            next_observation=get("next_observations")[b, -1],
            chunk_return=float(get("rewards")[b, -1]),
            discount=ours.config["discount"] ** steps,
            terminated=float(get("masks")[b, -1]) == 0.0,
            valid=[float(get("valid")[b, -1]) == 1.0] * steps,
            td_weight=float(get("valid")[b, -1]),
        )
        for b in range(len(get("observations")))
    ]
    keys = sorted(k for k in data if k.startswith(f"{prefix}draw/"))
    draws = {}
    for name, key in zip(draws_of(ours.config), keys, strict=True):
        drawn = as_double(data[key])
        if name in NUMBERS_FIRST.get(ours.agent, ()):
            drawn = torch.movedim(drawn, 0, -1)
        draws[name] = drawn.reshape(len(rows), -1)
    return rows, draws


def write_baseline(path: Path, problem: Problem, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a golden file of a baseline and returns what is in it."""
    rng = np.random.default_rng(seed)
    config = config_of(problem)
    weights = random_weights(problem, config, rng)
    data = {f"init/{k}": to_array(v) for k, v in weights.items()}
    data["config.json"] = np.frombuffer(json.dumps(config).encode(), dtype=np.uint8)
    ours = read_reference(data)
    for number in range(problem.updates):
        prefix = f"u{number}/"
        data |= {prefix + k: v for k, v in random_batch(problem, config, rng).items()}
        for i, (name, drawn) in enumerate(random_draws(problem, config, rng).items()):
            turned = name in NUMBERS_FIRST.get(problem.agent, ())
            kind = "uniform" if name.endswith("_tau") else "normal"
            data[f"{prefix}draw/{i:02d}_{kind}"] = drawn.T.copy() if turned else drawn
        record = update(ours, *read_update(ours, data, number))
        data |= {f"{prefix}info/{k}": to_array(v) for k, v in record.items()}
    data |= {f"final/{k}": to_array(v) for k, v in ours.weights.items()}
    np.savez(path, **data)
    return data


def random_batch(
    problem: Problem, config: dict[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    size, steps, seen = problem.batch_size, config["horizon_length"], problem.observation_dim
    valid = np.ones((size, steps))
    valid[list(problem.invalid_rows), steps // 2 :] = 0.0
    masks = (rng.uniform(size=(size, steps)) > 0.3).astype(float)
    arrays: dict[str, np.ndarray] = {
        "observations": rng.normal(size=(size, seen)),
        "actions": rng.uniform(-1, 1, size=(size, steps, config["action_dim"])),
        "next_observations": rng.normal(size=(size, steps, seen)),
        "rewards": problem.reward_scale * rng.normal(size=(size, steps)),
        "masks": masks,
        "valid": valid,
    }
    return {f"batch/{k}": v.astype(np.float32) for k, v in arrays.items()}

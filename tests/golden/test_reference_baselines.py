"""FQL, IFQL, DSRL and CGQL against a slow reference, which gives the authors' numbers itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_methods import as_ours, give_weights, gradients_of, method_of, networks_of
from golden_baseline_files import (
    config_of,
    random_draws,
    random_weights,
    read_reference,
    read_update,
    write_baseline,
)
from golden_files import Problem
from reference_baselines import (
    GUIDED_FIELD,
    SLOW_FIELD,
    Reference,
    Row,
    losses_and_gradients,
    update,
)
from reference_update import as_double
from replay_golden import replay
from torch import Tensor

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.kernel_choice import Kernels, chosen_kernels

FOLDER = Path(__file__).parent
RTOL, ATOL = 1e-5, 1e-6


@pytest.mark.parametrize("agent", ["fql", "ifql", "dsrl", "cgql_l"])
def test_the_slow_reference_gives_the_authors_numbers(agent: str) -> None:
    with np.load(FOLDER / f"golden_{agent}.npz", allow_pickle=False) as archive:
        data = dict(archive)
    ours, number = read_reference(data), 0
    while f"u{number}/batch/actions" in data:
        record = update(ours, *read_update(ours, data, number))
        for name, value in record.items():
            mine, theirs = torch.as_tensor(value).numpy(), data[f"u{number}/info/{name}"]
            np.testing.assert_allclose(mine, theirs, RTOL, ATOL, err_msg=name)
        number += 1
    assert number == 2
    for key, weight in ours.weights.items():
        theirs = data[f"final/{key}"].reshape(weight.shape)
        np.testing.assert_allclose(weight.numpy(), theirs, RTOL, ATOL, err_msg=key)


# What the recorded files have at one value: sizes, layer norm, heads, scales, invalid chunks.
SHAPES: dict[str, dict[str, Any]] = {
    "layer norm in the actor, H=1, K=4, one head": {
        "invalid_rows": (0, 3),
        "settings": {
            **{"horizon_length": 1, "action_dim": 2, "flow_steps": 4, "num_qs": 1},
            **{"actor_layer_norm": True, "actor_hidden_dims": [24]},
        },
    },
    "H=5, K=7, ten heads without layer norm, no pessimism": {
        "batch_size": 4,
        "invalid_rows": (1,),
        "settings": {
            **{"horizon_length": 5, "flow_steps": 7, "num_qs": 10, "value_layer_norm": False},
            **{"value_hidden_dims": [48, 24, 16], "actor_hidden_dims": [40, 24, 32], "rho": 0.0},
        },
    },
    "large rewards, a short horizon, fast targets": {
        "reward_scale": 100.0,
        "settings": {"discount": 0.5, "rho": 2.0, "tau": 0.2, "lr": 1e-3},
    },
    "as many rows as numbers in a chunk": {"batch_size": 6},
    "every row invalid": {"invalid_rows": (0, 1, 2, 3, 4, 5), "batch_size": 6},
}
KNOBS: dict[str, list[dict[str, Any]]] = {
    "fql": [{"alpha": 10.0}, {"alpha": 0.0}, {"alpha": 300.0}],
    "ifql": [{"kappa": 0.9}, {"kappa": 0.5}, {"kappa": 0.95}],
    "dsrl": [
        {"noise_scale": 1.0, "target_entropy": -3.0},
        {"noise_scale": 0.4, "target_entropy": 0.0},
        {"noise_scale": 1.4, "target_entropy": None},
    ],
    "cgql": [
        {"mode": "linex", "inv_temp": 1.0, "guidance_coef": 0.2, "noisy_coef": 0.1},
        # Sharp enough that many heads are beyond the clip.
        {"mode": "linex", "inv_temp": 3.0, "guidance_coef": 0.02, "isd_clip": 0.7},
        {"mode": "simple", "inv_temp": 0.5, "guidance_coef": 0.5},
    ],
}


@pytest.mark.parametrize(
    ("knobs", "kernels"), [(0, "fast"), (1, "fast"), (2, "fast"), (0, "plain")]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("agent", KNOBS)
def test_files_of_other_sizes_and_knobs_replay(
    agent: str, shape: str, knobs: int, kernels: Kernels, tmp_path: Path
) -> None:
    given = SHAPES[shape]
    settings = given.get("settings", {}) | KNOBS[agent][knobs]
    problem = Problem(**(given | {"agent": agent, "settings": settings}))
    write_baseline(tmp_path / "made.npz", problem, seed=knobs)
    with chosen_kernels(kernels):
        comparison = replay(tmp_path / "made.npz")
    assert comparison.failures == [], comparison.worst
    assert comparison.not_compared == (["info/actor"] if agent == "dsrl" else [])


@dataclass(frozen=True)
class Variant:
    """What the recorded files' layout cannot say: chunks cut at any step, and our own knobs.

    Attributes:
        problem: sizes and the file's settings.
        knobs: of the method beside those.
    """

    problem: Problem
    knobs: dict[str, Any] = field(default_factory=dict)


def problem(agent: str, **settings: Any) -> Problem:
    sizes = {"horizon_length": 4, "action_dim": 2, "flow_steps": 5, "num_qs": 3}
    return Problem(agent=agent, batch_size=10, settings=sizes | settings)


VARIANTS = {
    **{f"{agent}, cut chunks": Variant(problem(agent)) for agent in KNOBS},
    **{
        f"{agent}, a frozen base": Variant(problem(agent), {"train_base": False}) for agent in KNOBS
    },
    **{
        f"{agent}, layer norm in the actor, none in the critic": Variant(
            problem(agent, actor_layer_norm=True, value_layer_norm=False)
        )
        for agent in KNOBS
    },
    "fql, the critic's term normalised": Variant(problem("fql"), {"normalize_q_loss": True}),
    "dsrl, half the numbers as target": Variant(problem("dsrl", target_entropy=None)),
    "cgql, without noisy chunks": Variant(problem("cgql", mode="simple")),
    "cgql, squared errors": Variant(problem("cgql", mode="mse", noisy_coef=0.7)),
    "cgql, beyond the clip": Variant(problem("cgql", isd_clip=0.05, inv_temp=2.0)),
}


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_the_gradients_of_every_network_are_the_references(
    name: str, kernels: Kernels
) -> None:
    variant = VARIANTS[name]
    config, rng = config_of(variant.problem) | variant.knobs, np.random.default_rng(5)
    weights = random_weights(variant.problem, config, rng)
    if not config.get("train_base", True):
        slow = (f"{SLOW_FIELD}/", f"{GUIDED_FIELD}/")
        weights = {k: v for k, v in weights.items() if not k.startswith(slow)}
    rows, batch = cut_chunks(variant.problem, config, rng)
    drawn = random_draws(variant.problem, config, rng)
    reference = Reference(variant.problem.agent, config, dict(weights))
    losses, gradients = losses_and_gradients(
        reference, rows, {k: as_double(v) for k, v in drawn.items()}
    )
    with chosen_kernels(kernels):
        method = method_of(config, variant.problem.observation_dim)
        networks = networks_of(method)
        give_weights(networks, weights)
        method.update_from(batch, as_ours(drawn, batch.action))
    logged = method.metrics()
    for ours, theirs in OUR_NAMES[variant.problem.agent].items():
        if theirs in losses:
            assert logged[ours] == pytest.approx(float(losses[theirs]), rel=2e-5, abs=1e-6), ours
    found = gradients_of(networks)
    assert gradients.keys() == found.keys()
    for key, gradient in gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(
            found[key].double(),
            gradient.reshape(found[key].shape),
            rtol=1e-4,
            atol=2e-5 * size,
            msg=lambda text, key=key: f"{key}: {text}",
        )
        assert size > 0, key


class Recorded:
    """Given noise in place of drawn noise, one array at every call."""

    def __init__(self, *noise: Tensor) -> None:
        self._left = list(noise)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        found = self._left.pop(0)
        return found.view(len(found), *shape)


@pytest.mark.parametrize("agent", KNOBS)
def test_what_acts_is_the_references(agent: str) -> None:
    given, samples = problem(agent, num_samples=5), 5
    config, rng = config_of(given), np.random.default_rng(3)
    weights = random_weights(given, config, rng)
    rows, batch = cut_chunks(given, config, rng)
    drawn = rng.normal(size=(samples, len(rows), len(rows[0].action))).astype(np.float32)
    method = method_of(config, given.observation_dim)
    give_weights(networks_of(method), weights)
    context = method.policy.encode(batch.observation)
    chunk = method.actor().chunk(context, Recorded(*torch.from_numpy(drawn)))
    reference = Reference(agent, config, weights)
    for number, row in enumerate(rows):
        expected = reference.acts(row.observation, as_double(drawn[:, number]))
        found = method.policy.executed(chunk)[number].flatten()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


OUR_NAMES = {
    "cgql": {"td_loss": "td", "noisy_critic_loss": "noisy", "bc_loss": "cloning"},
    "fql": {"td_loss": "td", "distill_loss": "distill", "actor_q": "value", "bc_loss": "cloning"},
    "ifql": {"td_loss": "td", "value_loss": "value", "bc_loss": "cloning"},
    "dsrl": {
        **{"td_loss": "td", "noise_critic_loss": "distill", "actor_loss": "actor"},
        **{"entropy": "entropy", "temperature": "alpha", "actor_q": "q", "bc_loss": "cloning"},
    },
}


def cut_chunks(
    problem: Problem, config: dict[str, Any], rng: np.random.Generator
) -> tuple[list[Row], TransitionBatch]:
    """Chunks of every length, cut by a termination or by a truncation."""
    steps, dim = config["horizon_length"], config["action_dim"]
    rows = []
    for number in range(problem.batch_size):
        length = 1 + number % steps
        ended = number % 3 == 0
        whole = length == steps
        seen, following = rng.normal(size=(2, problem.observation_dim)).astype(np.float32)
        rows.append(
            Row(
                observation=as_double(seen),
                action=as_double(rng.uniform(-1, 1, size=steps * dim).astype(np.float32)),
                next_observation=as_double(following),
                chunk_return=float(np.float32(rng.normal())),
                discount=float(np.float32(config["discount"] ** length)),
                terminated=ended,
                valid=[step < length for step in range(steps)],
                # After a termination nothing comes, so its chunk counts however short it is.
                td_weight=float(whole or ended),
            )
        )
    assert {row.td_weight for row in rows} == {0.0, 1.0}
    assert any(row.td_weight and not row.valid[-1] for row in rows)

    def stacked(values: list[Any]) -> Tensor:
        return torch.stack([torch.as_tensor(v) for v in values])

    batch = TransitionBatch(
        observation=stacked([row.observation for row in rows]).float(),
        action=stacked([row.action for row in rows]).float().view(-1, steps, dim),
        chunk_return=stacked([row.chunk_return for row in rows]).float(),
        next_observation=stacked([row.next_observation for row in rows]).float(),
        discount=stacked([row.discount for row in rows]).float(),
        terminated=stacked([row.terminated for row in rows]),
        truncated=stacked([not row.terminated and not row.valid[-1] for row in rows]),
        valid=stacked([row.valid for row in rows]),
    )
    return rows, batch

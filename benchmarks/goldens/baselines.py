"""Replays the authors' baselines, FQL, IFQL, DSRL and CGQL: what their files call what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowPolicy

from goldens.golden_file import GoldenFile
from goldens.weights import Networks
from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.losses import td_target
from vla_trqam.methods.cgql import CGQL, CGQLConfig, CGQLLConfig
from vla_trqam.methods.dsrl import ACTOR, DSRL, NOISE_CRITIC, DSRLConfig
from vla_trqam.methods.fql import FQL, FQLConfig
from vla_trqam.methods.ifql import IFQL, VALUE, IFQLConfig
from vla_trqam.methods.parts.entropy import TEMPERATURE
from vla_trqam.methods.parts.off_policy import Draws, OffPolicyConfig, SummedLosses

Outputs = dict[str, Tensor | float]


@dataclass(frozen=True)
class Baseline:
    """How a file of one method is read.

    Attributes:
        method: the method.
        config: of the file's settings, beside those that all share.
        kind: of the config.
        networks: the method's own, by the file's names; policy and critic are of all.
        draws: the file's draws, in order, by our names.
        numbers_first: those of them whose second axis is the batch.
        critic: what the file calls a critic's network.
        renamed: what the file calls our logged numbers.
        required: outputs without which it is no such file.
    """

    method: type[SummedLosses]
    kind: type[OffPolicyConfig]
    config: Callable[[GoldenFile], dict[str, Any]]
    networks: Callable[[SummedLosses], Networks]
    draws: tuple[str, ...]
    renamed: Mapping[str, str]
    required: tuple[str, ...]
    numbers_first: tuple[str, ...] = ()
    critic: str = "value_net"


def _policy(method: SummedLosses) -> MLPFlowPolicy:
    assert isinstance(method.policy, MLPFlowPolicy)
    assert method.policy.behaviour is not None
    return method.policy


def _fql_networks(method: SummedLosses) -> Networks:
    assert isinstance(method, FQL)
    behaviour = _policy(method).behaviour
    assert behaviour is not None
    return {
        "modules_actor_bc_flow/mlp": behaviour,
        "modules_actor_onestep_flow/mlp": method.one_step.network,
    }


def _ifql_networks(method: SummedLosses) -> Networks:
    behaviour = _policy(method).behaviour
    assert behaviour is not None
    return {"modules_actor_flow/mlp": behaviour, "modules_value/value_net": method.own[VALUE]}


def _dsrl_networks(method: SummedLosses) -> Networks:
    policy = _policy(method)
    assert policy.behaviour is not None
    return {
        "modules_actor_bc_flow/mlp": policy.behaviour,
        "modules_target_actor_bc_flow/mlp": policy.base,
        "modules_z_critic/value_net": method.own[NOISE_CRITIC],
        "modules_actor": method.own[ACTOR],
        "modules_alpha": method.own[TEMPERATURE],
    }


def _cgql_networks(method: SummedLosses) -> Networks:
    policy = _policy(method)
    assert policy.behaviour is not None
    return {"modules_actor/mlp": policy.behaviour, "modules_target_actor/mlp": policy.base}


def _cgql_knobs(golden: GoldenFile) -> dict[str, Any]:
    return {
        "inverse_temperature": golden.setting("inv_temp"),
        "guidance": golden.setting("guidance_coef"),
    }


def _cgql_l_knobs(golden: GoldenFile) -> dict[str, Any]:
    return _cgql_knobs(golden) | {
        "noisy_loss": golden.setting("mode"),
        "noisy_weight": golden.setting("noisy_coef"),
        "linex_clip": golden.setting("isd_clip"),
    }


BASELINES = {
    "fql": Baseline(
        FQL,
        FQLConfig,
        lambda golden: {
            "alpha": golden.setting("alpha"),
            "hidden_dims": tuple(golden.setting("actor_hidden_dims")),
            "layer_norm": golden.setting("actor_layer_norm"),
        },
        _fql_networks,
        ("next", "bc_x_0", "bc_tau", "distill"),
        {
            "info/critic/critic_loss": "td_loss",
            "info/actor/bc_flow_loss": "bc_loss",
            "info/actor/distill_loss": "distill_loss",
        },
        ("info/critic/critic_loss", "info/actor/distill_loss", "info/grad/norm"),
    ),
    "ifql": Baseline(
        IFQL,
        IFQLConfig,
        lambda golden: {
            "kappa": golden.setting("kappa"),
            "num_samples": golden.setting("num_samples"),
        },
        _ifql_networks,
        ("bc_x_0", "bc_tau"),
        {
            "info/critic/critic_loss": "td_loss",
            "info/actor/actor_loss": "bc_loss",
            "info/value/value_loss": "value_loss",
            "info/value/v_mean": "value_mean",
        },
        ("info/critic/critic_loss", "info/value/value_loss", "info/grad/norm"),
    ),
    "dsrl": Baseline(
        DSRL,
        DSRLConfig,
        lambda golden: {
            "noise_scale": golden.setting("noise_scale"),
            "target_entropy": golden.setting("target_entropy"),
            "hidden_dims": tuple(golden.setting("actor_hidden_dims")),
        },
        _dsrl_networks,
        ("next", "distill", "bc_x_0", "bc_tau", "actor"),
        {
            "info/critic/critic_loss": "td_loss",
            "info/critic/distill_loss": "noise_critic_loss",
            "info/actor/actor_loss": "actor_loss",
            "info/actor/alpha": "temperature",
            "info/actor/entropy": "entropy",
            "info/actor/flow_loss": "bc_loss",
            "info/actor/q": "actor_q",
        },
        ("info/critic/critic_loss", "info/critic/distill_loss", "info/grad/norm"),
        numbers_first=("next", "actor"),
    ),
    "cgql": Baseline(
        CGQL,
        CGQLConfig,
        _cgql_knobs,
        _cgql_networks,
        ("next", "bc_x_0", "bc_tau"),
        {"info/critic/critic_loss": "td_loss", "info/actor/flow_loss": "bc_loss"},
        ("info/critic/critic_loss", "info/grad/norm"),
        critic="mlp",
    ),
    "cgql_l": Baseline(
        CGQL,
        CGQLLConfig,
        _cgql_l_knobs,
        _cgql_networks,
        ("next", "noisy_tau", "noisy_x_0", "bc_x_0", "bc_tau"),
        {
            "info/critic/critic_loss": "td_loss",
            "info/critic/noisy_critic_loss": "noisy_critic_loss",
            "info/actor/flow_loss": "bc_loss",
        },
        ("info/critic/critic_loss", "info/critic/noisy_critic_loss", "info/grad/norm"),
        critic="mlp",
    ),
}


def make(golden: GoldenFile, policy: MLPFlowPolicy, critic: Critic) -> SummedLosses:
    """The file's method, with random weights."""
    baseline, lr = BASELINES[golden.agent], golden.setting("lr")
    config = baseline.kind(
        actor_lr=lr,
        critic_lr=lr,
        train_base=True,
        base_ema_rate=golden.setting("tau"),
        **baseline.config(golden),
    )
    return baseline.method(policy, critic, config)


def networks_of(golden: GoldenFile, method: SummedLosses) -> Networks:
    """All of them by the file's names."""
    baseline = BASELINES[golden.agent]
    return {
        **baseline.networks(method),
        f"modules_critic/{baseline.critic}": method.critic.online,
        f"modules_target_critic/{baseline.critic}": method.critic.target,
    }


def read_draws(golden: GoldenFile, update: int, batch: TransitionBatch) -> Draws:
    """The recorded random numbers, in their order."""
    names, turned = BASELINES[golden.agent].draws, BASELINES[golden.agent].numbers_first
    keys = golden.keys(f"u{update}/draw/")
    if len(keys) != len(names):
        golden.refuse(f"{len(keys)} u{update}/draw entries, not {len(names)}")
    shape = batch.action.shape
    found: dict[str, Tensor] = {}
    for name, key in zip(names, keys, strict=True):
        if name.endswith("_tau"):
            found[name] = golden.tensor(key, shape[:1])
        elif name in turned:
            flat = golden.tensor(key, (shape[1:].numel(), shape[0]))
            found[name] = flat.t().reshape(shape)
        else:
            found[name] = golden.tensor(key, shape)
    return found


def replay_update(
    golden: GoldenFile, method: SummedLosses, update: int, batch: TransitionBatch
) -> Outputs:
    """Makes one update and returns its numbers by the file's names."""
    ended = golden[f"u{update}/batch/masks"][:, -1] == 0
    baseline, before = BASELINES[golden.agent], _values(golden, method, batch, ended)
    method.update_from(batch, read_draws(golden, update, batch))
    metrics = method.metrics()
    ours: Outputs = {theirs: metrics[name] for theirs, name in baseline.renamed.items()}
    gradients = [p.grad for g in method.optimizer.param_groups for p in g["params"]]
    return (
        ours
        | before
        | {
            # Theirs is the sum over arrays of each array's norm.
            "info/grad/norm": sum(float(g.norm()) for g in gradients),
            "info/grad/max": max(float(g.max()) for g in gradients),
            "info/grad/min": min(float(g.min()) for g in gradients),
        }
    )


@torch.no_grad()
def _values(
    golden: GoldenFile, method: SummedLosses, batch: TransitionBatch, ended: np.ndarray
) -> Outputs:
    """Means and ends of what the critic said before the update, of all chunks."""
    features = method.policy.encode(batch.observation)
    q = method.critic.online(features, batch.action)
    named = {"critic/q": q}
    if golden.agent == "ifql":
        # What it logs as q is the target.
        value, following = method.own[VALUE], method.policy.encode(batch.next_observation)
        found = value(following).squeeze(1)
        named = {
            "critic/q": td_target(
                batch.chunk_return, batch.discount, torch.from_numpy(ended), found
            ),
            "value/v": value(features),
        }
    return {
        f"info/{name}_{end}": getattr(values, end)()
        for name, values in named.items()
        for end in ("mean", "max", "min")
    }

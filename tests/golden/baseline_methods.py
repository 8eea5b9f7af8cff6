"""The library's FQL, IFQL, DSRL and CGQL by the slow reference's settings and names."""

import copy
from typing import Any

import numpy as np
import torch
from goldens.weights import named_weights
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
)
from reference_update import Weights
from torch import Tensor, nn
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.methods.cgql import CGQLConfig, CGQLLConfig
from vla_trqam.methods.dsrl import ACTOR, DSRLConfig
from vla_trqam.methods.dsrl import NOISE_CRITIC as OUR_NOISE_CRITIC
from vla_trqam.methods.fql import FQL, FQLConfig
from vla_trqam.methods.ifql import VALUE as OUR_VALUE
from vla_trqam.methods.ifql import IFQLConfig
from vla_trqam.methods.parts.entropy import TEMPERATURE as OUR_TEMPERATURE
from vla_trqam.methods.parts.off_policy import SummedLosses
from vla_trqam.methods.registry import make_method


def method_of(config: dict[str, Any], observation_dim: int) -> SummedLosses:
    """The library's method, by the reference's settings."""
    hidden, norm = tuple(config["actor_hidden_dims"]), config["actor_layer_norm"]
    policy = MLPFlowPolicy(
        MLPFlowConfig(
            observation_dim=observation_dim,
            action_dim=config["action_dim"],
            chunk_length=config["horizon_length"],
            hidden_dims=hidden,
            layer_norm=norm,
            num_flow_steps=config["flow_steps"],
        )
    )
    flat = config["action_dim"] * config["horizon_length"]
    ensemble = CriticEnsemble(
        observation_dim,
        flat,
        config["value_hidden_dims"],
        config["num_qs"],
        layer_norm=config["value_layer_norm"],
    )
    critic = Critic(ensemble, pessimism=config["rho"], target_rate=config["tau"])
    shared = {"train_base": config.get("train_base", True)}
    knobs: FQLConfig | IFQLConfig | DSRLConfig | CGQLConfig
    if config["agent_name"] == "fql":
        normalised = config.get("normalize_q_loss", False)
        knobs = FQLConfig(
            alpha=config["alpha"],
            hidden_dims=hidden,
            layer_norm=norm,
            normalize_q_loss=normalised,
            **shared,
        )
    elif config["agent_name"] == "ifql":
        knobs = IFQLConfig(kappa=config["kappa"], num_samples=config["num_samples"], **shared)
    elif config["agent_name"] == "cgql":
        knobs = cgql_knobs(config, shared)
    else:
        knobs = DSRLConfig(
            noise_scale=config["noise_scale"],
            target_entropy=config["target_entropy"],
            hidden_dims=hidden,
            **shared,
        )
    method = make_method(policy, critic, knobs)
    assert isinstance(method, SummedLosses)
    return method


def cgql_knobs(config: dict[str, Any], shared: dict[str, Any]) -> CGQLConfig:
    guided = {"inverse_temperature": config["inv_temp"], "guidance": config["guidance_coef"]}
    if config["mode"] == "simple":
        return CGQLConfig(**guided, **shared)
    return CGQLLConfig(
        noisy_loss=config["mode"],
        noisy_weight=config["noisy_coef"],
        linex_clip=config["isd_clip"],
        **guided,
        **shared,
    )


def networks_of(method: SummedLosses) -> dict[str, nn.Module]:
    """All networks by the reference's names."""
    policy, own = method.policy, method.own
    assert isinstance(policy, MLPFlowPolicy)
    agent = type(method).__name__.lower()
    field_key = FIELD[agent]
    critic, target = (TIMED_CRITIC, TIMED_TARGET) if agent == "cgql" else (CRITIC, TARGET)
    found: dict[str, nn.Module] = {
        critic: method.critic.online,
        target: method.critic.target,
        field_key: policy.base if policy.behaviour is None else policy.behaviour,
    }
    if isinstance(method, FQL):
        found[ONE_STEP] = method.one_step.network
    elif agent == "ifql":
        found[VALUE] = own[OUR_VALUE]
    elif agent == "cgql":
        if policy.behaviour is not None:
            found[GUIDED_FIELD] = policy.base
    else:
        found |= {NOISE_ACTOR: own[ACTOR], NOISE_CRITIC: own[OUR_NOISE_CRITIC]}
        found[TEMPERATURE] = own[OUR_TEMPERATURE]
        if policy.behaviour is not None:
            found[SLOW_FIELD] = policy.base
    return found


@torch.no_grad()
def give_weights(networks: dict[str, nn.Module], weights: Weights) -> None:
    given = set()
    for name, module in networks.items():
        for key, weight in named_weights(name, module):
            weight.copy_(weights[key].reshape(weight.shape))
            given.add(key)
    assert given == weights.keys()


def as_ours(drawn: dict[str, np.ndarray], action: Tensor) -> Weights:
    return {
        name: torch.from_numpy(value).reshape(
            len(action) if name.endswith("_tau") else action.shape
        )
        for name, value in drawn.items()
    }


def gradients_of(networks: dict[str, nn.Module]) -> Weights:
    """Every gradient by the reference's key and in its layout."""
    found: Weights = {}
    for name, module in networks.items():
        like = copy.deepcopy(module)
        pairs = list(zip(module.parameters(), like.parameters(), strict=True))
        assert len({own.grad is None for own, _ in pairs}) == 1, f"{name} is trained in part"
        if pairs[0][0].grad is not None:
            for own, twin in pairs:
                assert own.grad is not None
                twin.data = own.grad
            found |= {key: weight.detach() for key, weight in named_weights(name, like)}
    return found

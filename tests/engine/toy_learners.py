"""The smallest learners of both kinds, and batches for them."""

import torch
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.bc import BehaviourCloning, BehaviourCloningConfig
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

BATCH = 8


def make_policy(
    hidden: int = 8,
    observation_dim: int = 3,
    action_dim: int = 2,
    chunk_length: int = 2,
    flow_steps: int = 3,
) -> MLPFlowPolicy:
    config = MLPFlowConfig(
        observation_dim, action_dim, chunk_length, hidden_dims=(hidden,), num_flow_steps=flow_steps
    )
    return MLPFlowPolicy(config)


def make_cloning(seed: int = 0, num_steps: int = 10) -> BehaviourCloning:
    torch.manual_seed(seed)
    return BehaviourCloning(make_policy(), BehaviourCloningConfig(), num_steps)


def make_off_policy(seed: int = 0, **knobs: object) -> TRQAM:
    torch.manual_seed(seed)
    policy = make_policy()
    horizon, action_dim = policy.chunk_shape
    critic = Critic(CriticEnsemble(policy.feature_dim, horizon * action_dim, (8,), 2))
    return TRQAM(policy, critic, TRQAMConfig(**knobs))


def make_batch(seed: int) -> TransitionBatch:
    generator = torch.Generator().manual_seed(seed)
    return TransitionBatch(
        observation=torch.randn(BATCH, 3, generator=generator),
        action=torch.rand(BATCH, 2, 2, generator=generator) * 2 - 1,
        chunk_return=-torch.rand(BATCH, generator=generator),
        next_observation=torch.randn(BATCH, 3, generator=generator),
        discount=torch.full((BATCH,), 0.98),
        terminated=torch.rand(BATCH, generator=generator) < 0.2,
        truncated=torch.zeros(BATCH, dtype=torch.bool),
        valid=torch.ones(BATCH, 2, dtype=torch.bool),
    )

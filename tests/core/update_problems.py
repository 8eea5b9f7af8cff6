"""A small TRQAM on random data."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise

OBSERVATION, HORIZON, ACTION, BATCH, STEPS = 5, 2, 3, 12, 6


def method_of(
    config: TRQAMConfig | None = None, *, moved: bool = True, **of_critic: float
) -> TRQAM:
    """The same weights at every call; `moved` puts the tuned field away from its base."""
    torch.manual_seed(0)
    shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS)
    policy = MLPFlowPolicy(shape)
    if moved:
        with torch.no_grad():
            for parameter in policy.tuned.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3), **of_critic)
    return TRQAM(policy, critic, config or TRQAMConfig())


def batch_of(seed: int = 0, *, horizon: int = HORIZON, **changes: Any) -> TransitionBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch = TransitionBatch(
        observation=normal(BATCH, OBSERVATION),
        action=normal(BATCH, horizon, ACTION).clamp(-1, 1),
        chunk_return=normal(BATCH),
        next_observation=normal(BATCH, OBSERVATION),
        discount=torch.full((BATCH,), 0.9),
        terminated=torch.zeros(BATCH, dtype=torch.bool),
        truncated=torch.zeros(BATCH, dtype=torch.bool),
        valid=torch.ones(BATCH, horizon, dtype=torch.bool),
    )
    return replace(batch, **changes)


def noise_of(seed: int = 0) -> UpdateNoise:
    generator = torch.Generator().manual_seed(100 + seed)
    return UpdateNoise.draw(torch.zeros(BATCH, HORIZON, ACTION), STEPS, generator)


def gradients(method: TRQAM, batch: TransitionBatch, lam: float = 2.0) -> dict[str, Tensor]:
    """Every trained parameter's gradient of the loss, by its name in the loss module."""
    method.loss.zero_grad(set_to_none=True)
    method.loss(batch, noise_of(), lam).loss.backward()
    named = method.loss.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def weights(method: TRQAM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.loss.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str) -> bool:
    """Whether everything under a prefix is equal to the bit."""
    names = [name for name in first if name.startswith(prefix)]
    assert names, prefix
    return all(torch.equal(first[name], second[name]) for name in names)

"""A few updates of a random policy, and what they end in."""

import torch
from lerobot_contract import raw_observation
from torch import Tensor
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

ROWS = 2
CONFIG = TRQAMConfig(actor_lr=1e-3)


def moved(
    policy: LeRobotFlowPolicy,
    updates: int = 2,
    *,
    config: TRQAMConfig = CONFIG,
    rows: int = ROWS,
    num_parts: int = 1,
) -> dict[str, Tensor]:
    """Weights and numbers after some updates of TRQAM, the adapters' first step included."""
    torch.manual_seed(0)
    length, action = policy.chunk_shape[0], int(policy.action_mask.sum())
    critic = CriticEnsemble(policy.feature_dim, length * action, (16,), 2)
    method = TRQAM(policy, Critic(critic), config)
    generator, numbers = torch.Generator().manual_seed(1), {}
    for step in range(updates):
        chunk = policy.from_robot(torch.rand(rows, length, action, generator=generator) - 0.5)
        batch: TransitionBatch = TransitionBatch(
            observation=raw_observation(rows, step),  # type: ignore[arg-type]
            action=chunk,
            chunk_return=torch.randn(rows, generator=generator),
            next_observation=raw_observation(rows, 50 + step),  # type: ignore[arg-type]
            discount=torch.full((rows,), 0.9),
            terminated=torch.zeros(rows, dtype=torch.bool),
            truncated=torch.zeros(rows, dtype=torch.bool),
            valid=torch.ones(rows, length, dtype=torch.bool),
        )
        method.update(batch, generator, num_parts=num_parts)
        numbers |= {f"{step}.{k}": torch.tensor(v) for k, v in method.metrics().items()}
    weights = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    return weights | numbers


def differences(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> list[str]:
    assert one.keys() == other.keys()
    return [n for n in one if not torch.allclose(one[n], other[n], rtol=tolerance, atol=tolerance)]

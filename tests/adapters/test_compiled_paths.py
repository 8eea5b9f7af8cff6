"""A path's evaluations compiled: the same numbers, whole graphs."""

import pytest
import torch
from lerobot_contract import FAMILIES, make_policy, raw_observation
from torch import Tensor
from torch._dynamo.utils import counters
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

ROWS = 2


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def moved(policy: LeRobotFlowPolicy, updates: int = 2) -> dict[str, Tensor]:
    """Weights and numbers after some updates of TRQAM, the adapters' first step included."""
    torch.manual_seed(0)
    length, action = policy.chunk_shape[0], int(policy.action_mask.sum())
    critic = CriticEnsemble(policy.feature_dim, length * action, (16,), 2)
    method = TRQAM(policy, Critic(critic), TRQAMConfig(actor_lr=1e-3))
    generator, numbers = torch.Generator().manual_seed(1), {}
    for step in range(updates):
        chunk = policy.from_robot(torch.rand(ROWS, length, action, generator=generator) - 0.5)
        batch: TransitionBatch = TransitionBatch(
            observation=raw_observation(ROWS, step),  # type: ignore[arg-type]
            action=chunk,
            chunk_return=torch.randn(ROWS, generator=generator),
            next_observation=raw_observation(ROWS, 50 + step),  # type: ignore[arg-type]
            discount=torch.full((ROWS,), 0.9),
            terminated=torch.zeros(ROWS, dtype=torch.bool),
            truncated=torch.zeros(ROWS, dtype=torch.bool),
            valid=torch.ones(ROWS, length, dtype=torch.bool),
        )
        method.update(batch, generator)
        numbers |= {f"{step}.{k}": torch.tensor(v) for k, v in method.metrics().items()}
    weights = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    return weights | numbers


def differences(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> list[str]:
    assert one.keys() == other.keys()
    return [n for n in one if not torch.allclose(one[n], other[n], rtol=tolerance, atol=tolerance)]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_compiled_updates_are_those_of_before_in_whole_graphs(kind: str, lora: bool) -> None:
    plain = moved(make_policy(kind, lora=lora))
    policy = make_policy(kind, lora=lora)
    policy.compile_paths("aot_eager")
    assert differences(moved(policy), plain, 1e-6) == []
    # Tuned and base, each with a gradient and without: none of them broken in two.
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny_pi0", "smolvla"])
def test_machine_code_gives_the_same_to_float_tolerance(kind: str) -> None:
    plain = moved(make_policy(kind, lora=False))
    policy = make_policy(kind, lora=False)
    policy.compile_paths()
    assert differences(moved(policy), plain, 2e-4) == []

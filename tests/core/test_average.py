"""The policy that acts as the running mean of its weights."""

import copy

import pytest
import torch
from torch import nn
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.folder.state import load_module_tensors, module_tensors
from vla_trqam.errors import UserError
from vla_trqam.methods.parts.average import WeightAverage
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

BATCH, HORIZON, ACTIONS, OBSERVATION = 8, 2, 3, 4


def batch_of() -> TransitionBatch:
    torch.manual_seed(3)
    return TransitionBatch(
        observation=torch.randn(BATCH, OBSERVATION),
        action=torch.rand(BATCH, HORIZON, ACTIONS) * 2 - 1,
        chunk_return=torch.randn(BATCH),
        next_observation=torch.randn(BATCH, OBSERVATION),
        discount=torch.full((BATCH,), 0.9),
        terminated=torch.zeros(BATCH, dtype=torch.bool),
        truncated=torch.zeros(BATCH, dtype=torch.bool),
        valid=torch.ones(BATCH, HORIZON, dtype=torch.bool),
    )


def learner_of(rate: float) -> TRQAM:
    torch.manual_seed(0)
    shape = MLPFlowConfig(OBSERVATION, ACTIONS, HORIZON, (16,), num_flow_steps=3)
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTIONS, (16,), 2))
    return TRQAM(MLPFlowPolicy(shape), critic, TRQAMConfig(average_rate=rate))


def updated(learner: TRQAM, count: int) -> list[list[torch.Tensor]]:
    """The weights before the first and after every update."""
    generator, batch = torch.Generator().manual_seed(1), batch_of()
    parameters = list(learner.policy.trainable_parameters())
    history = [[p.detach().clone() for p in parameters]]
    for _ in range(count):
        learner.update(batch, generator)
        history.append([p.detach().clone() for p in parameters])
    return history


def test_a_young_average_is_the_mean_and_an_old_one_forgets_by_its_rate() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight], 0.25)
    seen, expected = [0.0], 0.0
    for step in range(1, 9):
        weight.data.fill_(float(step * step))
        seen.append(float(step * step))
        average.follow()
        rate = max(0.25, 1 / (step + 1))
        expected += rate * (seen[-1] - expected)
        assert float(average.weights[0]) == pytest.approx(expected, rel=1e-6)
        if step <= 3:
            assert expected == pytest.approx(sum(seen) / len(seen))


def test_of_weights_in_bfloat16_it_moves_by_steps_that_they_have_no_room_for() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = WeightAverage([weight], 0.001)
    average.num_updates += 10_000  # no longer young
    weight.data.fill_(1.1)
    for _ in range(2000):
        average.follow()
    there, wanted = float(weight.data[0]), 1.0
    expected = there + (wanted - there) * (1 - 0.001) ** 2000
    torch.testing.assert_close(average.weights[0].data, torch.full((3,), expected))
    with average.in_place():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, torch.full((3,), expected, dtype=torch.bfloat16))
    assert float(weight.data[0]) == there


def test_the_policy_acts_with_the_average_and_goes_on_training_with_its_own_weights() -> None:
    learner = learner_of(0.1)
    history = updated(learner, 5)
    parameters = list(learner.policy.trainable_parameters())
    mean = [torch.stack(each).mean(dim=0) for each in zip(*history, strict=True)]
    with learner.acting():
        for found, expected in zip(parameters, mean, strict=True):
            torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-7)
    for found, own in zip(parameters, history[-1], strict=True):
        assert torch.equal(found, own)


def test_an_average_changes_nothing_of_the_training() -> None:
    with_average, without = updated(learner_of(0.1), 4), updated(learner_of(0.0), 4)
    for one, other in zip(with_average[-1], without[-1], strict=True):
        assert torch.equal(one, other)


def test_the_weights_come_back_where_acting_fails() -> None:
    learner = learner_of(0.1)
    last = updated(learner, 2)[-1]
    with pytest.raises(RuntimeError, match="the simulator"), learner.acting():
        raise RuntimeError("the simulator")
    for found, own in zip(learner.policy.trainable_parameters(), last, strict=True):
        assert torch.equal(found, own)


def test_a_checkpoint_holds_the_average_beside_the_weights() -> None:
    learner, other = learner_of(0.05), learner_of(0.05)
    updated(learner, 3)
    load_module_tensors(other, copy.deepcopy(module_tensors(learner)))
    assert other.average is not None
    assert int(other.average.num_updates) == 3
    with learner.acting(), other.acting():
        pairs = zip(
            learner.policy.trainable_parameters(),
            other.policy.trainable_parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(name.startswith("average") for name in module_tensors(learner_of(0.0)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="average_rate"):
        TRQAMConfig(average_rate=rate)

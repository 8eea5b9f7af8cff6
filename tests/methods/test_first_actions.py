"""The first n of H: what is executed is valued, what is not only rides along."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_problems import DOUBLE, FunctionPolicy
from test_method_contract import METHODS, NAMES, SMALL, a_reward, changed, state_of
from torch import Tensor
from update_problems import ACTION, BATCH, OBSERVATION, STEPS
from update_problems import batch_of as short_batch_of
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import GeneratorNoise, OffPolicyMethod
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.time_grid import Posterior, TimeGrid, per_step

__all__ = ["a_reward"]  # a fixture

HORIZON, EXECUTED = 5, 2


def policy_of(executed: int | None) -> MLPFlowPolicy:
    torch.manual_seed(0)
    shape = MLPFlowConfig(
        OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS, n_action_steps=executed
    )
    return MLPFlowPolicy(shape)


def method_of(name: str, executed: int | None = EXECUTED, **knobs: Any) -> OffPolicyMethod:
    policy = policy_of(executed)
    critic = Critic(CriticEnsemble(OBSERVATION, policy.executed_size, (24, 24), 3))
    config = METHODS[name].config(**SMALL.get(name, {}) | knobs)
    return make_method(policy, critic, config)


def batch_of(seed: int, **changes: Any) -> TransitionBatch:
    return short_batch_of(seed, horizon=HORIZON, **changes)


def updated(method: OffPolicyMethod, *batches: TransitionBatch) -> OffPolicyMethod:
    for number, batch in enumerate(batches):
        method.update(batch, torch.Generator().manual_seed(number))
    return method


@pytest.fixture(params=[name for name in NAMES if name != "reward_matching"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_of_a_chunk_executed_is_the_update_as_it_was(name: str) -> None:
    batches = [batch_of(seed) for seed in range(3)]
    plain, said = updated(method_of(name, None), *batches), updated(method_of(name, 5), *batches)
    assert changed(said, state_of(plain)) == []
    assert said.scalars() == plain.scalars()


def test_what_was_done_after_the_executed_actions_teaches_nothing(name: str) -> None:
    """Neither what it was, nor that the episode was over by then."""
    first = batch_of(0)
    other = first.action.clone()
    other[:, EXECUTED:] = -other[:, EXECUTED:]
    short = first.valid.clone()
    short[::2, EXECUTED:] = False
    method = updated(method_of(name), first)
    same = updated(method_of(name), replace(first, action=other, valid=short))
    assert changed(same, state_of(method)) == []


def test_the_critic_learns_from_what_was_executed(name: str) -> None:
    first = batch_of(0)
    other = first.action.clone()
    other[:, EXECUTED - 1] = -other[:, EXECUTED - 1]
    method = updated(method_of(name), first)
    moved = changed(updated(method_of(name), replace(first, action=other)), state_of(method))
    learns = METHODS[name].requirements.learns_critic
    assert any(key.startswith("critic.online.") for key in moved) == learns


def test_chunks_that_were_not_executed_whole_teach_the_critic_nothing(name: str) -> None:
    if not METHODS[name].requirements.learns_critic:
        return
    short = torch.ones(BATCH, HORIZON, dtype=torch.bool)
    short[:, EXECUTED - 1 :] = False
    method = method_of(name)
    method.update_critic(batch_of(0, valid=short), torch.Generator().manual_seed(0))
    assert method.critic_metrics()["td_loss"] == 0.0


def test_every_method_acts_in_whole_chunks_and_executes_the_first(name: str) -> None:
    method = updated(method_of(name), batch_of(0))
    context = method.policy.encode(batch_of(7).observation)
    noise = GeneratorNoise(torch.Generator().manual_seed(3), BATCH, torch.device("cpu"))
    chunk = method.actor().chunk(context, noise)
    assert chunk.shape == (BATCH, HORIZON, ACTION)
    assert torch.equal(method.policy.to_robot(chunk), chunk[:, :EXECUTED])
    if method.next_action is not None:
        assert method.next_action.shape == (BATCH, EXECUTED, ACTION)


def test_the_adjoint_starts_at_what_is_executed_and_reaches_the_rest_through_the_base() -> None:
    method = updated(method_of("trqam"), batch_of(0))
    assert isinstance(method, TRQAM)
    assert method._result is not None
    output = method._result.output
    start, first = output.terminal_adjoint, output.adjoint[0]
    assert bool((start[:, EXECUTED:] == 0).all())
    assert float(start[:, :EXECUTED].abs().max()) > 0
    assert float(first[:, EXECUTED:].abs().max()) > 0


@pytest.mark.parametrize(("per_action", "divisor"), [(True, EXECUTED), (False, 1)])
def test_the_kl_is_per_executed_action(per_action: bool, divisor: int) -> None:
    method = updated(method_of("trqam", kl_per_action=per_action), batch_of(0), batch_of(1))
    assert isinstance(method, TRQAM)
    assert method._result is not None
    whole = float(method._result.output.kl_per_step.sum())
    assert whole > 0
    assert method.metrics()["kl_estimate"] == pytest.approx(whole / divisor, rel=1e-6)


def test_an_edit_of_what_is_executed_lies_in_the_flows_chunk() -> None:
    policy = policy_of(EXECUTED)
    chunk, edit = torch.randn(3, HORIZON, ACTION), torch.randn(3, EXECUTED, ACTION)
    inside = policy.embedded(edit, chunk)
    assert torch.equal(policy.executed(inside, clip=False), edit)
    assert torch.equal(inside[:, EXECUTED:], chunk[:, EXECUTED:])
    assert not policy.embedded(edit)[:, EXECUTED:].any()


@pytest.mark.parametrize("count", [0, HORIZON + 1])
def test_more_than_a_chunk_or_nothing_cannot_be_executed(count: int) -> None:
    with pytest.raises(UserError, match=f"n_action_steps has {count}; .* 1 to {HORIZON}"):
        policy_of(3).take_executed_length(count)


# A base whose two actions go together: N(0, [[s2, r], [r, s2]]).
S2, R, LAM, SLOPE = 0.5, 0.3, 1.5, 1.2


def correlated_gain(tau: float) -> Tensor:
    """The (2, 2) field of that base along the linear path: ``(tau C - (1 - tau)) M^-1``."""
    covariance = torch.tensor([[S2, R], [R, S2]], dtype=DOUBLE)
    unit = torch.eye(2, dtype=DOUBLE)
    marginal = tau**2 * covariance + (1 - tau) ** 2 * unit
    return (tau * covariance - (1 - tau) * unit) @ torch.linalg.inv(marginal)


def test_the_optimum_moves_the_rest_of_the_chunk_as_the_base_goes_with_it() -> None:
    """``Q = slope x_1`` of the first action alone: the mean is ``(s2, r) slope / lam``."""

    class FirstOnly(FunctionPolicy):
        executed_length = 1

    def base(x: Tensor, tau: Tensor) -> Tensor:
        return (x.squeeze(-1) @ correlated_gain(float(tau[0])).T).unsqueeze(-1)

    grid = TimeGrid(200, Posterior())
    policy = FirstOnly(base, base, (2, 1), 200)
    x_1 = torch.zeros(1, 2, 1, dtype=DOUBLE, requires_grad=True)
    q = SLOPE * policy.executed(x_1, clip=False).sum()
    (gradient,) = torch.autograd.grad(q, x_1)

    def pullback(step: int, cotangent: Tensor) -> Tensor:
        tau = grid.steps[step].adjoint_tau
        assert tau is not None
        return (cotangent.squeeze(-1) @ correlated_gain(tau)).unsqueeze(-1)

    adjoint = lean_adjoint(-gradient, pullback, grid)
    gap = -per_step([s.variance / s.gain for s in grid.steps], adjoint) * adjoint / LAM
    mean = torch.zeros(1, 2, 1, dtype=DOUBLE)
    for i, step in enumerate(grid.steps):
        velocity = base(mean, torch.full((1,), grid.tau(i))) + gap[i]
        mean = step.keep * mean + step.gain * velocity
    expected = torch.tensor([S2, R], dtype=DOUBLE) * SLOPE / LAM
    torch.testing.assert_close(mean.flatten(), expected, rtol=0.03, atol=0)

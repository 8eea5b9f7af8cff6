"""External KL, SQAM, QAM-E and residual RL against closed forms and independent loops."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closed_forms import moves_of
from flow_problems import DOUBLE
from torch import Tensor, nn
from update_problems import (
    ACTION,
    BATCH,
    HORIZON,
    OBSERVATION,
    STEPS,
    batch_of,
    method_of,
    noise_of,
    same,
    weights,
)
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import chosen_kernels
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.methods.base import GeneratorNoise
from vla_trqam.methods.external_kl import ExternalKLConfig, ExternalKLLoss
from vla_trqam.methods.parts.edit import EDIT, Edit
from vla_trqam.methods.parts.off_policy import OffPolicyConfig
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.qam_e import QAME, QAMEConfig
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.residual import Residual, ResidualConfig
from vla_trqam.methods.sqam import SQAM, SQAMConfig
from vla_trqam.methods.trqam import TRQAM, SchemeName, TRQAMConfig
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid, per_step

SCHEMES: tuple[SchemeName, ...] = ("posterior", "shifted_euler")


def policy_of(steps: int = STEPS, horizon: int = HORIZON, seed: int = 0) -> MLPFlowPolicy:
    torch.manual_seed(seed)
    shape = MLPFlowConfig(OBSERVATION, ACTION, horizon, (24, 24), num_flow_steps=steps)
    return MLPFlowPolicy(shape)


def critic_of() -> Critic:
    return Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3))


def family(config: Any, policy: MLPFlowPolicy | None = None) -> Any:
    """The method of these knobs, the same weights at every call."""
    policy = policy or policy_of()
    torch.manual_seed(1)
    return make_method(policy, critic_of(), config)


# External KL.


@pytest.mark.parametrize("per_action", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.7, 20.0, 4000.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_penaltys_minimiser_is_qams_at_the_temperature_of_the_penalty(
    scheme: SchemeName, lam: float, per_action: bool
) -> None:
    """``-(2 V / B) a / (2 + c h lam)`` with ``c = 1``, or 1 / H of a KL per action."""
    config = ExternalKLConfig(scheme=scheme, kl_per_action=per_action)
    loss = ExternalKLLoss(policy_of(), critic_of(), config)
    moves, c = moves_of(config.chain, STEPS), 1 / HORIZON if per_action else 1.0
    adjoint = torch.randn(STEPS, BATCH, HORIZON, ACTION, dtype=DOUBLE)
    factors = 2 * moves.variance / moves.gain / (2 + c * lam / STEPS)
    best = -per_step(list(factors), adjoint) * adjoint
    best.requires_grad_(True)
    loss.matching(best, adjoint, lam).backward()
    assert best.grad is not None
    assert float(best.grad.abs().max()) < 1e-12
    least = float(loss.matching(best.detach(), adjoint, lam))
    for number in range(5):
        step = 1e-2 * torch.randn(best.shape, dtype=DOUBLE)
        assert float(loss.matching(best.detach() + step, adjoint, lam)) > least, number


def test_at_ten_steps_it_takes_a_lambda_of_twenty_to_halve_the_correction() -> None:
    """In the authors' chain: the reason for the bracket and step that the method has."""
    config = ExternalKLConfig(scheme="shifted_euler", kl_per_action=False)
    loss = ExternalKLLoss(policy_of(steps=10), critic_of(), config)
    adjoint = torch.randn(10, BATCH, HORIZON, ACTION, dtype=DOUBLE)
    moves = moves_of(config.chain, 10)
    halved = -0.5 * per_step(list(moves.variance / moves.gain), adjoint) * adjoint
    halved.requires_grad_(True)
    loss.matching(halved, adjoint, 20.0).backward()
    assert halved.grad is not None
    assert float(halved.grad.abs().max()) < 1e-12
    defaults = ExternalKLConfig()
    assert defaults.lam_init == 20.0
    # A chunk of 50 at ten steps and a KL per action: still to a hundredth.
    assert 2 / (2 + defaults.lam_max / (10 * 50)) < 0.01
    assert 2 / (2 + TRQAMConfig().lam_max / (10 * 50)) > 0.7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_a_penalty_external_kl_is_qam_at_beta_one(scheme: SchemeName) -> None:
    """Its lambda may not be 0, so a tiny one: the loss to many digits."""
    gap, adjoint = (torch.randn(STEPS, BATCH, HORIZON, ACTION, dtype=DOUBLE) for _ in range(2))
    config = ExternalKLConfig(scheme=scheme)
    loss = ExternalKLLoss(policy_of(), critic_of(), config)
    expected = adjoint_matching_loss(gap, adjoint, TimeGrid(STEPS, config.chain), 1.0)
    assert float(loss.matching(gap, adjoint, 1e-12)) == pytest.approx(float(expected), rel=1e-10)


def test_the_penaltys_gradient_reaches_the_tuned_field_alone() -> None:
    method = family(ExternalKLConfig())
    before = weights(method)
    method.update_with(batch_of(0), noise_of())
    method.update_with(batch_of(1), noise_of(1))
    assert same(before, weights(method), "policy.base.")
    assert not same(before, weights(method), "policy.tuned.")


def test_a_lambda_of_another_meaning_is_refused() -> None:
    external, own = family(ExternalKLConfig()), family(TRQAMConfig())
    assert "lambda" not in own.scalars()
    for method, state, said in (
        (external, own.scalars(), "lambda there is TRQAM's own and this run's is the weight"),
        (own, external.scalars(), "lambda there is the weight of a penalty and this run's is"),
    ):
        with pytest.raises(UserError, match=said):
            method.load_scalars(state)
    external.load_scalars(external.scalars() | {"lam": 77.0})
    assert external.trust_region.lam == 77.0


def test_a_lambda_that_no_dual_moves_stays_the_settings_own() -> None:
    """A QAM that goes on with TRQAM's critic is QAM."""
    qam, earlier = family(QAMConfig()), family(TRQAMConfig())
    qam.load_scalars(earlier.scalars() | {"lam": 0.2, "kl_ema": 0.7})
    assert (qam.trust_region.lam, qam.trust_region.kl_ema) == (1.0, 0.7)


# SQAM.


@torch.no_grad()
def blind_to_actions(policy: MLPFlowPolicy) -> MLPFlowPolicy:
    """A base whose velocity does not depend on x: its Jacobian is zero."""
    first = policy.base.layers[0]
    assert isinstance(first, nn.Linear)
    first.weight[:, OBSERVATION : OBSERVATION + HORIZON * ACTION] = 0.0
    return policy


def test_sqam_is_qam_where_the_bases_jacobian_is_zero() -> None:
    """Of the authors' chain exactly, at any K."""
    knobs: dict[str, Any] = {"scheme": "shifted_euler", "inverse_temperature": 2.0}
    found = []
    for config in (QAMConfig(**knobs), SQAMConfig(**knobs)):
        method = family(config, blind_to_actions(policy_of()))
        for number in range(3):
            method.update_with(batch_of(number), noise_of(number))
        found.append(weights(method))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=2e-6)


def test_sqam_is_another_method_where_it_is_not() -> None:
    outputs = []
    for config in (QAMConfig(), SQAMConfig()):
        method = family(config)
        outputs.append(method.loss(batch_of(), noise_of(), 1.0))
    lean, scalar = outputs
    assert torch.equal(lean.terminal_adjoint, scalar.terminal_adjoint)
    assert not torch.allclose(lean.adjoint[0], scalar.adjoint[0], rtol=0.05)
    for i in range(STEPS):
        expected = (i + 1) / STEPS * scalar.terminal_adjoint  # paired with the next
        torch.testing.assert_close(scalar.adjoint[i], expected)


def mixed_batch() -> Any:
    """Rows that end, rows that are cut short, and whole ones that go on."""
    batch = batch_of()
    batch.terminated[:4] = True
    batch.valid[2:7, 1:] = False
    return batch


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_the_value_penalty_and_its_gradient_are_those_of_a_loop_and_of_differences(
    kernels: Any,
) -> None:
    weight, batch = 0.7, mixed_batch()
    with chosen_kernels(kernels):
        method, plain = family(SQAMConfig(value_penalty=weight)), family(SQAMConfig())
        for each in (method, plain):
            each.critic.double()
        action = torch.rand(BATCH, HORIZON, ACTION) * 2 - 1
        online = method.critic.online

        def penalty() -> float:
            total = 0.0
            with torch.no_grad():
                policy_q = online(batch.next_observation, action)
                data_q = online(batch.observation, batch.action)
            for e in range(3):
                for b in range(7, BATCH):  # those before end, or are cut short
                    total += float(policy_q[e, b] - data_q[e, b])
            return total / (3 * BATCH)

        given = replace(batch, next_action=action)
        found = method.loss.critic_loss(given, noise_of())
        without = plain.loss.critic_loss(given, noise_of())
        assert float(found.more["value_penalty"]) == pytest.approx(penalty(), rel=1e-9)
        assert float((found.loss - without.loss).detach()) == pytest.approx(
            weight * penalty(), rel=1e-6
        )
        assert float(found.td_loss) == pytest.approx(float(without.td_loss), rel=1e-12)
        found.loss.backward()
        without.loss.backward()
        name, index = "layers.0.weight", (1, 3, 5)
        own, other = (dict(m.critic.online.named_parameters())[name] for m in (method, plain))
        assert own.grad is not None
        assert other.grad is not None
        step, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                own[index] += sign * step
                ends.append(penalty())
                own[index] -= sign * step
        slope = weight * (ends[0] - ends[1]) / (2 * step)
        assert abs(slope) > 1e-6
        assert float(own.grad[index] - other.grad[index]) == pytest.approx(slope, rel=1e-5)


def test_a_value_penalty_lowers_what_the_policy_does_against_what_the_data_did() -> None:
    gaps = []
    for weight in (0.0, 1.0):
        method = family(SQAMConfig(value_penalty=weight, critic_lr=3e-3))
        for number in range(60):
            method.update_with(batch_of(number % 3), noise_of(number % 3))
        output = method.loss(batch_of(), noise_of(), 1.0)
        values = method.score(batch_of().next_observation, output.next_action)
        gaps.append(float(values.mean() - output.q.mean()))
    assert gaps[1] < gaps[0] - 0.2


def test_sqams_adjoint_is_its_own_and_its_penalty_a_weight() -> None:
    with pytest.raises(UserError, match="SQAM's is 'scalar': leave it out, or take qam"):
        SQAMConfig(adjoint="lean")
    for weight in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=r"value_penalty is .*; it must be finite"):
            SQAMConfig(value_penalty=weight)
    assert isinstance(family(SQAMConfig()), SQAM)


# The edits.


def edit_of(method: Any) -> Edit:
    found = method.loss.edit if isinstance(method, QAME) else method.edit
    assert isinstance(found, Edit)
    return found


def edited_by_hand(method: Any, features: Tensor, flow: Tensor, noise: Tensor) -> Tensor:
    """The edited chunk from the network's own mean and deviation."""
    network, clipped = edit_of(method).networks[EDIT], flow.clamp(-1, 1)
    hidden = network.trunk.hidden(torch.cat([features, clipped.flatten(1)], dim=1))
    mean, log_std = network.trunk.layers[-1](hidden), network.log_std(hidden)
    edit = torch.tanh(mean + log_std.exp() * noise.flatten(1)).view_as(flow)
    return (clipped + method.config.edit_scale * edit).clamp(-1, 1)


EDITS: list[Any] = [
    QAMEConfig(edit_scale=0.5, edit_hidden_dims=(16,)),
    ResidualConfig(edit_scale=0.5, edit_hidden_dims=(16,)),
]


@pytest.mark.parametrize("config", EDITS, ids=["qam_e", "residual"])
def test_what_acts_is_the_flow_and_a_sampled_edit_within_the_limits(config: Any) -> None:
    policy = method_of().policy  # tuned away from its base
    assert isinstance(policy, MLPFlowPolicy)
    method, context = family(config, policy), policy.encode(batch_of().observation)
    field = policy.velocity if isinstance(method, QAME) else policy.base_velocity
    chunk = method.actor().chunk(context, GeneratorNoise(generator(), BATCH, torch.device("cpu")))
    noise = GeneratorNoise(generator(), BATCH, torch.device("cpu"))
    x_0, drawn = (noise.normal((HORIZON, ACTION)) for _ in range(2))
    with torch.no_grad():
        flow = sample_ode(lambda x, tau: field(x, tau, context), x_0, TimeGrid(STEPS))
        expected = edited_by_hand(method, context, flow, drawn)
    torch.testing.assert_close(chunk, expected)
    assert bool((chunk.abs() <= 1.0).all())
    assert float((chunk - flow.clamp(-1, 1)).abs().max()) > 0.1
    again = method.actor().chunk(context, noise)
    assert not torch.allclose(again, chunk)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def test_qam_es_edit_takes_nothing_from_the_flows_gradient() -> None:
    """Tuned field and critic get QAM's gradients: the edit sees both as they are."""
    knobs: dict[str, Any] = {"inverse_temperature": 2.0}
    edits = family(QAMEConfig(**knobs, edit_hidden_dims=(16,)))
    plain = family(QAMConfig(**knobs))
    noise = edits.loss.draw(batch_of().action, STEPS, generator())
    batch = batch_of(terminated=torch.ones(BATCH, dtype=torch.bool))  # no next action counts
    for method, drawn in ((edits, noise), (plain, replace(noise, more={}))):
        method.loss(batch, drawn, 1.0).loss.backward()
    for part in ("policy", "critic"):
        pairs = zip(
            edits.modules()[part].named_parameters(),
            plain.modules()[part].named_parameters(),
            strict=True,
        )
        for (name, own), (_, other) in pairs:
            assert (own.grad is None) == (other.grad is None), name
            if own.grad is not None:
                torch.testing.assert_close(own.grad, other.grad)
    network = edits.modules()[EDIT]
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


@pytest.mark.parametrize("config", EDITS, ids=["qam_e", "residual"])
def test_an_edits_gradient_is_that_of_the_critic_at_the_edited_action(config: Any) -> None:
    """By finite differences of ``mean (alpha log p - mean_j Q_j)`` in one of its weights."""
    method = family(config)
    edit = edit_of(method)
    network, critic = edit.networks[EDIT].double(), method.critic.online.double()
    features, chunk, noise = (
        torch.randn(shape, dtype=DOUBLE, generator=generator())
        for shape in ((BATCH, OBSERVATION), *[(BATCH, HORIZON, ACTION)] * 2)
    )
    with torch.no_grad():
        edit.networks["temperature"].log_value.fill_(0.4)
    weight = network.log_std.weight

    def loss() -> float:
        with torch.no_grad():
            action, log_p = edit(features, 0.3 * chunk, noise)
            return float((math.exp(0.4) * log_p - critic(features, action).mean(dim=0)).mean())

    network.zero_grad()
    edit.terms(critic, features, 0.3 * chunk, noise).loss.backward()
    assert all(p.grad is None for p in critic.parameters())
    step, index, ends = 1e-3, (2, 3), []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
            ends.append(loss())
            weight[index] -= sign * step
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope) > 1e-4
    assert float(weight.grad[index]) == pytest.approx(slope, rel=1e-3)


class PaddedPolicy(MLPFlowPolicy):
    """The last action dimension is padding."""

    @property
    def action_mask(self) -> Tensor:
        return torch.tensor([True] * (ACTION - 1) + [False])


@pytest.mark.parametrize("config", EDITS, ids=["qam_e", "residual"])
def test_an_edit_is_of_what_the_robot_executes_alone(config: Any) -> None:
    torch.manual_seed(0)
    shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS)
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * (ACTION - 1), (24, 24), 3))
    method = make_method(PaddedPolicy(shape), critic, config)
    method.update(batch_of(), generator())
    assert method.next_action is not None
    assert method.next_action.shape == (BATCH, HORIZON, ACTION - 1)
    context = method.policy.encode(batch_of().observation)
    chunks = [
        actor.chunk(context, GeneratorNoise(generator(), BATCH, torch.device("cpu")))
        for actor in (method.actor(), method.actor("base"))
    ]
    assert chunks[0].shape == (BATCH, HORIZON, ACTION)
    if isinstance(method, Residual):
        assert torch.equal(chunks[0][..., -1], chunks[1][..., -1])
    assert not torch.allclose(chunks[0][..., :-1], chunks[1][..., :-1].clamp(-1, 1))


def test_the_temperature_falls_while_the_edits_entropy_is_above_its_target() -> None:
    def temperature_after(config: type[Any], target: float) -> float:
        method = family(config(target_entropy=target, edit_hidden_dims=(16,)))
        drawn = torch.Generator().manual_seed(2)
        for number in range(10):
            method.update(batch_of(number), drawn)
        return float(method.metrics()["temperature"])

    for config in (QAMEConfig, ResidualConfig):
        assert temperature_after(config, -50.0) < 1.0 < temperature_after(config, 50.0)


@pytest.mark.parametrize("config", [QAMEConfig, ResidualConfig])
def test_an_edits_knobs_are_checked(config: type[Any]) -> None:
    with pytest.raises(UserError, match=r"edit_scale is -0\.1; it must be finite and not negative"):
        config(edit_scale=-0.1)
    with pytest.raises(UserError, match=r"edit_hidden_dims is \[0\]; its widths"):
        config(edit_hidden_dims=(0,))


def test_qam_e_has_no_average_that_its_edit_was_not_trained_behind() -> None:
    with pytest.raises(UserError, match=r"average_rate is 0\.1, but QAM-E's edit"):
        QAMEConfig(average_rate=0.1)


def test_networks_beside_the_policy_are_not_sharded() -> None:
    two = SimpleNamespace(
        num_processes=2,
        process_index=0,
        device=torch.device("cpu"),
        mixed_precision="no",
        distributed_type=SimpleNamespace(value="MULTI_CPU"),
    )
    with pytest.raises(UserError, match="shard: edit and temperature beside the policy cannot be"):
        QAME(policy_of(), critic_of(), QAMEConfig(), two, shard=True)  # type: ignore[arg-type]


def test_residual_rl_asks_neither_the_policys_weights_nor_its_gradient() -> None:
    assert not Residual.requirements.trains_field
    assert not Residual.requirements.host_acts
    assert not Residual.requirements.adjoint
    assert isinstance(ResidualConfig(), OffPolicyConfig)
    assert ResidualConfig().max_grad_norm is None
    policy = policy_of()

    def refuse(*_: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.zeros(BATCH, HORIZON, ACTION)

    policy.base_velocity = refuse  # type: ignore[method-assign]
    policy.velocity = refuse  # type: ignore[method-assign]
    method = family(ResidualConfig(edit_hidden_dims=(16,)), policy)
    method.update(batch_of(), generator())
    assert method.metrics()["td_loss"] > 0


@pytest.mark.parametrize("config", [TRQAMConfig(), QAMConfig()])
def test_trqam_and_qam_have_nothing_of_their_own(config: TRQAMConfig) -> None:
    method = family(config)
    assert type(method) is TRQAM
    assert method.modules().keys() == {"policy", "critic"}
    assert method.loss.draw(batch_of().action, STEPS, generator()).more == {}


def test_an_edit_of_no_width_is_refused_behind_a_frozen_flow() -> None:
    with pytest.raises(UserError, match=r"edit_scale is 0\.0, which leaves the base alone"):
        ResidualConfig(edit_scale=0.0)


def test_an_edit_of_no_width_behind_a_tuned_flow_acts_as_qam() -> None:
    policy = method_of().policy  # tuned away from its base
    assert isinstance(policy, MLPFlowPolicy)
    context, chunks = policy.encode(batch_of().observation), []
    for config in (QAMConfig(), QAMEConfig(edit_scale=0.0, edit_hidden_dims=(16,))):
        noise = GeneratorNoise(generator(), BATCH, torch.device("cpu"))
        chunks.append(family(config, policy).actor().chunk(context, noise))
    torch.testing.assert_close(chunks[1], chunks[0].clamp(-1, 1))

"""What one update moves, what it leaves alone, and what each part of the loss can reach."""

import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from update_problems import (
    ACTION,
    BATCH,
    HORIZON,
    OBSERVATION,
    STEPS,
    batch_of,
    gradients,
    method_of,
    noise_of,
    same,
    weights,
)
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.losses import pessimistic_value
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.trqam import TRQAM, SchemeName, TRQAMConfig, UpdateNoise
from vla_trqam.sde import sample_ode
from vla_trqam.trust_region import path_kl

SCHEME_NAMES = get_args(SchemeName)


def test_gradients_reach_the_tuned_field_and_the_online_critic_only() -> None:
    named = gradients(method_of(), batch_of())
    reached = {".".join(name.split(".")[:2]) for name in named}
    assert reached == {"policy.tuned", "critic.online"}
    named = gradients(method_of(TRQAMConfig(train_base=True)), batch_of())
    reached = {".".join(name.split(".")[:2]) for name in named}
    assert reached == {"policy.tuned", "policy.behaviour", "critic.online"}


def test_the_td_error_does_not_reach_the_actor() -> None:
    method, batch = method_of(), batch_of()
    plain = gradients(method, batch)
    other = gradients(method, replace(batch, chunk_return=batch.chunk_return * 50))
    assert same(plain, other, "policy.tuned")
    assert not same(plain, other, "critic.online")


def test_the_adjoint_loss_does_not_reach_the_critic() -> None:
    method, batch = method_of(), batch_of()
    plain, other = gradients(method, batch), gradients(method, batch, lam=20.0)
    assert same(plain, other, "critic.online")
    assert not same(plain, other, "policy.tuned")


def test_the_online_critic_does_not_steer_the_actor_before_its_target_follows() -> None:
    method, batch = method_of(), batch_of()
    plain = gradients(method, batch)
    with torch.no_grad():
        for parameter in method.critic.online.parameters():
            parameter.add_(0.3)
    assert same(plain, gradients(method, batch), "policy.tuned")


def test_the_flow_matching_loss_reaches_the_training_base_only() -> None:
    method, batch = method_of(TRQAMConfig(train_base=True)), batch_of()
    plain = gradients(method, batch)
    frozen = gradients(method_of(), batch)
    assert same(frozen, plain, "policy.tuned")
    assert same(frozen, plain, "critic.online")


def test_everything_but_the_loss_is_detached() -> None:
    output = method_of(TRQAMConfig(train_base=True)).loss(batch_of(), noise_of(), 1.0)
    assert output.loss.requires_grad
    parts: list[Tensor] = [
        *(output.td_loss, output.adjoint_loss, output.kl_per_step, output.q, output.target),
        *(output.trajectory.x, output.adjoint, output.terminal_adjoint, output.next_action),
    ]
    assert output.bc_loss is not None
    assert not any(part.requires_grad for part in [*parts, output.bc_loss])
    total = output.td_loss + output.adjoint_loss + output.bc_loss
    torch.testing.assert_close(output.loss.detach(), total)


def test_the_forward_noise_does_not_depend_on_lambda() -> None:
    method, batch = method_of(), batch_of()
    paths = [method.loss(batch, noise_of(), lam).trajectory.x for lam in (0.1, 1.0, 100.0)]
    assert torch.equal(paths[0], paths[1])
    assert torch.equal(paths[0], paths[2])


def test_the_td_target_is_the_return_and_the_pessimistic_value_of_the_clipped_ode_action() -> None:
    method = method_of()
    terminated = torch.arange(BATCH) % 3 == 0
    truncated = torch.arange(BATCH) % 3 == 1
    batch = batch_of(terminated=terminated, truncated=truncated)
    output = method.loss(batch, noise_of(), 1.0)
    context = method.policy.encode(batch.next_observation)
    with torch.no_grad():
        action = sample_ode(
            lambda x, tau: method.policy.velocity(x, tau, context),
            noise_of().next_action,
            method.loss.grid,
        ).clamp(-1, 1)
        q = method.critic.target(batch.next_observation, action)
    torch.testing.assert_close(output.next_action, action, rtol=1e-5, atol=1e-6)
    value = pessimistic_value(q, method.critic.pessimism)
    expected = batch.chunk_return + 0.9 * torch.where(terminated, 0.0, value)
    torch.testing.assert_close(output.target, expected, rtol=1e-5, atol=1e-5)
    expected_loss = ((output.q - output.target) ** 2).mean()
    torch.testing.assert_close(output.td_loss, expected_loss)


@pytest.mark.parametrize(("terminated", "counts"), [(False, False), (True, True)])
def test_a_chunk_cut_short_counts_only_where_a_termination_cut_it(
    terminated: bool, counts: bool
) -> None:
    valid = torch.ones(BATCH, HORIZON, dtype=torch.bool)
    valid[0, -1] = False
    ends = torch.zeros(BATCH, dtype=torch.bool)
    ends[0] = terminated
    batch = batch_of(valid=valid, terminated=ends)
    other = batch.chunk_return.clone()
    other[0] += 10
    method = method_of()
    first, second = gradients(method, batch), gradients(method, replace(batch, chunk_return=other))
    assert same(first, second, "critic.online") is not counts


def test_the_training_base_does_not_imitate_steps_that_were_not_taken() -> None:
    valid = torch.ones(BATCH, HORIZON, dtype=torch.bool)
    valid[0, -1] = False
    batch = batch_of(valid=valid)
    other = batch.action.clone()
    other[0, -1] = 0.9
    method = method_of(TRQAMConfig(train_base=True))

    def behaviour_loss(action: Tensor) -> float:
        changed = replace(batch, action=action)
        with torch.no_grad():
            x_tau = (1 - noise_of().bc_tau.view(-1, 1, 1)) * noise_of().bc_x_0
            x_tau = x_tau + noise_of().bc_tau.view(-1, 1, 1) * changed.action
            predicted = method.policy.behaviour_velocity(
                x_tau, noise_of().bc_tau, changed.observation
            )
        error = (predicted - (changed.action - noise_of().bc_x_0)) ** 2
        return float((error * valid.unsqueeze(-1)).mean())

    for action in (batch.action, other):
        output = method.loss(replace(batch, action=action), noise_of(), 1.0)
        assert output.bc_loss is not None
        assert float(output.bc_loss) == pytest.approx(behaviour_loss(action), rel=1e-5)


def test_the_loss_uses_lambda_before_its_step_and_the_kl_before_the_weights_step() -> None:
    method, batch = method_of(TRQAMConfig(kl_budget=0.1)), batch_of()
    before = method.trust_region.lam
    output = method.loss(batch, noise_of(), before)
    result = method.update_with(batch, noise_of())
    assert result.lam == before
    assert method.trust_region.lam != before
    assert result.kl_estimate == float(output.kl_per_step.sum()) / HORIZON
    torch.testing.assert_close(result.output.loss.detach(), output.loss.detach())


def test_target_networks_follow_the_weights_as_they_were_before_the_step() -> None:
    method = method_of(TRQAMConfig(train_base=True, base_ema_rate=0.3), target_rate=0.2)
    with torch.no_grad():
        for parameter in [
            *method.critic.online.parameters(),
            *method.policy.behaviour_parameters(),
        ]:
            parameter.add_(0.1)
    old = weights(method)
    method.update_with(batch_of(), noise_of())
    new = weights(method)
    pairs = {"critic.target": ("critic.online", 0.2), "policy.base": ("policy.behaviour", 0.3)}
    for average, (current, rate) in pairs.items():
        for name in [n for n in old if n.startswith(f"{average}.")]:
            source = old[name.replace(average, current)]
            torch.testing.assert_close(new[name], (1 - rate) * old[name] + rate * source)
            assert not torch.equal(new[name.replace(average, current)], source)


def test_two_runs_with_the_same_noise_are_equal_to_the_bit() -> None:
    first, second = method_of(), method_of()
    for step in range(3):
        first.update_with(batch_of(step), noise_of(step))
        second.update_with(batch_of(step), noise_of(step))
    assert same(weights(first), weights(second), "")


def test_the_critics_update_alone_is_its_part_of_the_whole_one() -> None:
    """The critic's part does not depend on the actor's while the actor stands still."""
    still = TRQAMConfig(actor_lr=1e-12)
    whole, alone = method_of(still), method_of(still)
    before = weights(alone)
    for step in range(3):
        expected = whole.update_with(batch_of(step), noise_of(step)).metrics()
        found = alone.update_critic_with(batch_of(step), noise_of(step)).metrics()
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
    mine, other = weights(alone), weights(whole)
    for name in mine:
        if name.startswith("critic."):
            torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6)
    assert same(mine, before, "policy.")
    assert not same(mine, before, "critic.")
    assert alone.trust_region.lam == still.lam_init


def run(config: TRQAMConfig, updates: int = 3) -> tuple[TRQAM, list[float], list[float]]:
    method = method_of(config)
    results = [method.update_with(batch_of(step), noise_of(step)) for step in range(updates)]
    losses = [float(result.output.adjoint_loss) for result in results]
    return method, losses, [result.kl_estimate for result in results]


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_lambda_one_with_a_frozen_dual_is_qam_to_the_bit(scheme: SchemeName) -> None:
    trqam = run(TRQAMConfig(scheme=scheme, lam_init=1.0, dual_step_size=0.0))
    qam = run(qam_config(TRQAMConfig(scheme=scheme, lam_init=7.0), 1.0))
    assert same(weights(trqam[0]), weights(qam[0]), "")
    assert trqam[1:] == qam[1:]


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("beta", [0.2, 5.0])
def test_a_frozen_lambda_is_qam_at_beta_one_over_lambda_for_whole_updates(
    beta: float, scheme: SchemeName
) -> None:
    """Adam does not see the loss's scale, nor does a clip that always binds."""
    given = TRQAMConfig(scheme=scheme, max_grad_norm=1e-2)
    trqam, trqam_losses, trqam_kls = run(replace(given, lam_init=1 / beta, dual_step_size=0.0))
    qam, qam_losses, qam_kls = run(qam_config(given, beta))
    assert trqam_losses == pytest.approx([loss / beta for loss in qam_losses], rel=1e-4)
    assert trqam_kls == pytest.approx(qam_kls, rel=1e-4)
    mine, other = weights(trqam), weights(qam)
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-6)


def in_double(value: Any) -> Any:
    """A batch or a noise with its real numbers in double precision."""
    tensors = [f.name for f in fields(value) if isinstance(getattr(value, f.name), torch.Tensor)]
    real = [name for name in tensors if getattr(value, name).is_floating_point()]
    return replace(value, **{name: getattr(value, name).double() for name in real})


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_loss_on_a_whole_path_is_lambda_times_qams_in_double_precision(
    scheme: SchemeName,
) -> None:
    lam, losses, given = 0.37, [], TRQAMConfig(scheme=scheme)
    for config, used in ((given, lam), (qam_config(given, 1 / lam), 1.0)):
        method = method_of(config)
        method.loss.double()
        output = method.loss(in_double(batch_of()), in_double(noise_of()), used)
        losses.append(float(output.adjoint_loss))
    assert losses[0] == pytest.approx(lam * losses[1], rel=1e-12)


def test_one_clip_over_everything_lets_the_critic_shrink_the_actors_step() -> None:
    batch = batch_of()
    wild = replace(batch, chunk_return=batch.chunk_return * 1e4)

    def actor_gradient(shared: bool, data: TransitionBatch) -> list[Tensor]:
        method = method_of(TRQAMConfig(shared_optimizer=shared))
        method.update_with(data, noise_of())
        return [p.grad.clone() for p in method.policy.trainable_parameters() if p.grad is not None]

    def norm(values: list[Tensor]) -> float:
        return math.sqrt(sum(float(v.square().sum()) for v in values))

    apart, apart_wild = actor_gradient(False, batch), actor_gradient(False, wild)
    assert all(torch.equal(a, b) for a, b in zip(apart, apart_wild, strict=True))
    assert norm(apart) == pytest.approx(1.0, rel=1e-3)
    assert norm(actor_gradient(True, wild)) < 1e-2 * norm(actor_gradient(True, batch))


def test_the_norms_are_those_before_the_clip() -> None:
    batch = batch_of()
    named = gradients(method_of(), batch, lam=3.0)

    def norm(prefix: str) -> float:
        parts = [g.square().sum() for name, g in named.items() if name.startswith(prefix)]
        return math.sqrt(float(torch.stack(parts).sum()))

    apart = method_of(TRQAMConfig(max_grad_norm=0.1)).update_with(batch, noise_of())
    expected = [norm("policy.tuned"), norm("critic.online")]
    assert [float(n) for n in apart.grad_norms] == pytest.approx(expected, rel=1e-5)
    together = method_of(TRQAMConfig(shared_optimizer=True)).update_with(batch, noise_of())
    assert [float(n) for n in together.grad_norms] == pytest.approx([norm("")], rel=1e-5)


def test_metrics_are_their_documented_formulas() -> None:
    method = method_of(TRQAMConfig(train_base=True))
    result = method.update_with(batch_of(), noise_of())
    out, metrics = result.output, result.metrics()
    assert out.bc_loss is not None
    q, x_1 = out.q, out.trajectory.x_1
    deviations = ((q - q.mean(0)) ** 2).mean(0).sqrt()
    expected = {
        "kl_estimate": float(out.kl_per_step.sum()) / HORIZON,
        "lam": 3.0,
        "adjoint_loss": float(out.adjoint_loss),
        "adjoint_norm_terminal": sum(float(a.norm()) for a in out.terminal_adjoint) / BATCH,
        "adjoint_norm_initial": sum(float(a.norm()) for a in out.adjoint[0]) / BATCH,
        "last_step_offset": sum(float(g.norm()) for g in out.last_gap)
        / BATCH
        / out.trajectory.grid.num_flow_steps,
        "td_loss": float(out.td_loss),
        "bc_loss": float(out.bc_loss),
        "q_mean": float(q.mean()),
        "q_std": float(deviations.mean()),
        "target_mean": float(out.target.mean()),
        "clipped_action_fraction": float(((x_1 > 1) | (x_1 < -1)).sum()) / x_1.numel(),
        "actor_grad_norm": float(result.grad_norms[0]),
        "critic_grad_norm": float(result.grad_norms[1]),
    }
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert "bc_loss" not in method_of().update_with(batch_of(), noise_of()).metrics()


def test_the_terminal_adjoint_is_minus_beta_times_the_target_critics_gradient_at_the_end() -> None:
    for beta in (1.0, 4.0):
        method = method_of(qam_config(TRQAMConfig(), beta))
        out = method.loss(batch_of(), noise_of(), 1.0)
        x_1 = out.trajectory.x_1.clone().requires_grad_(True)
        value = method.critic.target(batch_of().observation, x_1.clamp(-1, 1)).mean(0).sum()
        (gradient,) = torch.autograd.grad(value, x_1)
        torch.testing.assert_close(out.terminal_adjoint, -beta * gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_logged_kl_is_the_path_kl_of_both_fields_at_the_sampled_states(
    scheme: SchemeName,
) -> None:
    method = method_of(TRQAMConfig(scheme=scheme))
    out = method.loss(batch_of(), noise_of(), 1.0)
    policy, context = method.policy, batch_of().observation
    gaps = []
    with torch.no_grad():
        for i, x in enumerate(out.trajectory.states):
            tau = torch.full((BATCH,), i / STEPS)
            gaps.append(policy.velocity(x, tau, context) - policy.base_velocity(x, tau, context))
    expected = path_kl(torch.stack(gaps), method.loss.grid)
    torch.testing.assert_close(out.kl_per_step.sum(), expected, rtol=1e-4, atol=1e-6)


def test_noise_is_a_function_of_the_generator_and_standard() -> None:
    action = torch.zeros(400, HORIZON, ACTION)

    def draw(seed: int) -> UpdateNoise:
        return UpdateNoise.draw(action, STEPS, torch.Generator().manual_seed(seed))

    first, again, other = draw(0), draw(0), draw(1)
    for name in (f.name for f in fields(UpdateNoise) if f.name not in ("more", "loss_steps")):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert first.sde_steps.shape == (STEPS, *action.shape)
    normal = torch.stack([first.next_action, first.sde_x_0, first.bc_x_0, *first.sde_steps])
    flat = normal.flatten(1)
    correlation = flat @ flat.t() / flat.shape[1]
    torch.testing.assert_close(correlation, torch.eye(len(flat)), rtol=0, atol=0.1)
    assert first.bc_tau.shape == (400,)
    assert 0 <= float(first.bc_tau.min()) < float(first.bc_tau.max()) < 1
    assert float(first.bc_tau.mean()) == pytest.approx(0.5, abs=0.05)


def test_a_policy_with_a_frozen_base_keeps_it_to_the_bit_and_trains_the_rest() -> None:
    method = method_of()
    old = weights(method)
    for step in range(3):
        method.update_with(batch_of(step), noise_of(step))
    new = weights(method)
    assert same(old, new, "policy.base")
    for prefix in ("policy.tuned", "critic.online", "critic.target"):
        assert not same(old, new, prefix)


class PaddedPolicy(MLPFlowPolicy):
    """The last action dimension is padding."""

    @property
    def action_mask(self) -> Tensor:
        return torch.tensor([True] * (ACTION - 1) + [False])

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 2.0])


def test_the_critic_sees_real_dimensions_within_their_limits_and_the_flow_all() -> None:
    torch.manual_seed(0)
    shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS)
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * (ACTION - 1), (24, 24), 3))
    method = TRQAM(PaddedPolicy(shape), critic, TRQAMConfig(dual_step_size=0.0))
    batch, noise = batch_of(), noise_of()
    out = method.loss(batch, noise, 1.0)
    low, high = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 2.0])
    assert out.next_action.shape == (BATCH, HORIZON, ACTION - 1)
    assert bool(((out.next_action >= low) & (out.next_action <= high)).all())
    beyond = (out.trajectory.x_1[..., :-1] < low) | (out.trajectory.x_1[..., :-1] > high)
    assert bool(beyond.any())
    assert bool((out.terminal_adjoint[..., -1] == 0).all())
    assert bool((out.terminal_adjoint[..., :-1][beyond] == 0).all())
    assert bool((out.terminal_adjoint[..., :-1][~beyond] != 0).all())
    # Padded dimensions feed back into real ones: the adjoint reaches them.
    assert bool((out.adjoint[0][..., -1] != 0).any())
    padding = batch.action.clone()
    padding[..., -1] = 7.0
    assert torch.equal(method.loss(replace(batch, action=padding), noise, 1.0).q, out.q)
    result = method.update_with(batch, noise)
    share = float(beyond.float().mean())
    assert result.metrics()["clipped_action_fraction"] == pytest.approx(share)

"""The settings that choose chain and adjoint: what they do to an update, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from update_problems import STEPS, batch_of, gradients, method_of, noise_of, same, weights
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.adapters.velocity_mlp import MLPPathFields

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.trqam import TRQAM, SchemeName, TRQAMConfig
from vla_trqam.policy import PathFields
from vla_trqam.time_grid import Posterior, ShiftedEuler

SHIFTED = TRQAMConfig(scheme="shifted_euler")


def test_the_posterior_chain_with_the_lean_adjoint_is_the_default() -> None:
    assert TRQAMConfig() == TRQAMConfig(scheme="posterior", adjoint="lean", last_step_weight=1.0)
    assert TRQAMConfig().chain == Posterior()
    assert method_of().loss.grid.scheme == Posterior()


def test_a_schemes_knobs_reach_its_chain() -> None:
    assert TRQAMConfig(last_step_weight=0.2).chain == Posterior(0.2)
    euler = TRQAMConfig(
        scheme="shifted_euler", time_shift=0.5, adjoint_time="same", final_step="sde"
    )
    assert euler.chain == ShiftedEuler(0.5, "same", "sde")
    assert qam_config(euler, 3.0).chain == euler.chain


IDLE: list[dict[str, Any]] = [
    {"time_shift": 0.5},
    {"final_step": "sde"},
    {"adjoint_time": "same"},
    {"last_step_weight": 0.5, "scheme": "shifted_euler"},
]


@pytest.mark.parametrize("knobs", IDLE, ids=str)
def test_a_knob_of_the_other_scheme_is_refused_by_name(knobs: dict[str, Any]) -> None:
    name, value = next(iter(knobs.items()))
    chosen = knobs.get("scheme", "posterior")
    other = "shifted_euler" if chosen == "posterior" else "posterior"
    with pytest.raises(UserError) as error:
        TRQAMConfig(**knobs)
    assert str(error.value) == (
        f"{name} is {value!r}, but it belongs to the {other} scheme and scheme is {chosen!r}; "
        f"set scheme to {other!r}, or leave it out"
    )


@pytest.mark.parametrize(
    ("knob", "known"),
    [
        ({"scheme": "euler"}, "'posterior' or 'shifted_euler'"),
        ({"adjoint": "fat"}, "'lean' or 'scalar'"),
    ],
)
def test_an_unknown_choice_is_refused_with_those_that_are_known(
    knob: dict[str, Any], known: str
) -> None:
    ((name, value),) = knob.items()
    with pytest.raises(UserError, match=f"{name} is '{value}'; it must be {known}"):
        TRQAMConfig(**knob)


def test_a_policy_of_one_flow_step_is_refused_before_its_first_update() -> None:
    policy = MLPFlowPolicy(MLPFlowConfig(5, 3, 2, (8,), num_flow_steps=1))
    critic = Critic(CriticEnsemble(5, 6, (8,), 2))
    with pytest.raises(UserError, match="num_flow_steps is 1: the posterior chain's last step"):
        TRQAM(policy, critic, TRQAMConfig())
    assert TRQAM(policy, critic, SHIFTED).loss.grid.num_flow_steps == 1


def test_the_two_chains_differ_and_share_the_next_action_and_the_critics_part() -> None:
    ours, authors = method_of(), method_of(SHIFTED)
    first, second = (m.loss(batch_of(), noise_of(), 2.0) for m in (ours, authors))
    assert not torch.allclose(first.trajectory.x_1, second.trajectory.x_1)
    torch.testing.assert_close(first.next_action, second.next_action)
    torch.testing.assert_close(first.td_loss, second.td_loss)


def test_the_last_step_weight_holds_the_tuned_field_to_the_base_at_the_last_step_only() -> None:
    """The chain, its adjoint and its KL do not depend on it; the loss does, linearly."""
    weights_of_last = (0.5, 1.0, 2.0)
    out = [
        method_of(TRQAMConfig(last_step_weight=w)).loss(batch_of(), noise_of(), 2.0)
        for w in weights_of_last
    ]
    for other in out[1:]:
        assert torch.equal(out[0].trajectory.x, other.trajectory.x)
        assert torch.equal(out[0].adjoint, other.adjoint)
        assert torch.equal(out[0].kl_per_step, other.kl_per_step)
    assert float(out[0].kl_per_step[-1]) == 0.0
    low, middle, high = (float(o.adjoint_loss) for o in out)
    assert low < middle < high
    assert high - middle == pytest.approx(2 * (middle - low), rel=1e-3)


# The scalar adjoint.


def scalar(scheme: SchemeName) -> TRQAMConfig:
    return TRQAMConfig(scheme=scheme, adjoint="scalar")


def no_pullback(*_: object) -> Tensor:
    raise AssertionError("the scalar adjoint asked for a vector-Jacobian product")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("scheme", "times"),
    [
        ("posterior", [(i + 1) / STEPS for i in range(STEPS)]),
        ("shifted_euler", [i / STEPS for i in range(STEPS)]),
    ],
)
def test_the_scalar_adjoint_asks_for_no_jacobian(
    scheme: SchemeName, times: list[float], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields in (PathFields, MLPPathFields):
        monkeypatch.setattr(fields, "base_pullback", no_pullback)
    method = method_of(replace(scalar(scheme), keep_activations=keep))
    result = method.update_with(batch_of(), noise_of())
    output = result.output
    expected = torch.stack([t * output.terminal_adjoint for t in times])
    torch.testing.assert_close(output.adjoint, expected)
    assert result.kl_estimate > 0.0
    with pytest.raises(AssertionError, match="vector-Jacobian"):
        method_of(TRQAMConfig(scheme=scheme)).update_with(batch_of(), noise_of())


@pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])
def test_the_adjoints_choice_changes_nothing_but_the_adjoint(scheme: SchemeName) -> None:
    lean, other = (
        method_of(config).loss(batch_of(), noise_of(), 2.0)
        for config in (TRQAMConfig(scheme=scheme), scalar(scheme))
    )
    for name in ("next_action", "terminal_adjoint", "kl_per_step", "td_loss"):
        torch.testing.assert_close(getattr(lean, name), getattr(other, name))
    torch.testing.assert_close(lean.trajectory.x, other.trajectory.x)
    assert not torch.allclose(lean.adjoint, other.adjoint, rtol=1e-2)


@pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])
def test_the_trust_region_is_over_the_scalar_adjoint_too(scheme: SchemeName) -> None:
    config = replace(scalar(scheme), kl_budget=1e-4, kl_ema_rate=1.0)
    method = method_of(config, moved=False)
    results = [method.update_with(batch_of(step), noise_of(step)) for step in range(3)]
    assert results[0].kl_estimate == 0.0
    assert results[2].kl_estimate > 1e-4
    assert method.trust_region.lam > results[2].lam


# Memory for time.


@pytest.mark.parametrize("adjoint", ["lean", "scalar"])
@pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])
def test_without_kept_activations_gradients_and_updates_are_the_same_up_to_rounding(
    scheme: SchemeName, adjoint: Any
) -> None:
    kept = TRQAMConfig(scheme=scheme, adjoint=adjoint)
    dropped = replace(kept, keep_activations=False)
    found, expected = (gradients(method_of(c), batch_of()) for c in (dropped, kept))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * (1 + scale))
    first, second = method_of(kept), method_of(dropped)
    before = weights(first)
    kls = [m.update_with(batch_of(), noise_of()).kl_estimate for m in (first, second)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert not same(before, weights(second), "policy.tuned")


@pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])
def test_without_kept_activations_the_first_kl_is_exactly_zero(scheme: SchemeName) -> None:
    method = method_of(TRQAMConfig(scheme=scheme, keep_activations=False), moved=False)
    assert method.update_with(batch_of(), noise_of()).kl_estimate == 0.0

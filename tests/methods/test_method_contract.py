"""What every method of the registry keeps to, whatever it is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from update_problems import ACTION, BATCH, HORIZON, OBSERVATION, STEPS, batch_of
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.engine.cached import CriticOnly
from vla_trqam.engine.folder.state import (
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
)
from vla_trqam.errors import DivergenceError, UserError
from vla_trqam.methods.base import GeneratorNoise, OffPolicyMethod
from vla_trqam.methods.registry import METHODS, make_method, name_of, requirements_of
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

NAMES = list(METHODS)
SMALL: dict[str, dict[str, Any]] = {
    "fql": {"hidden_dims": (24,)},
    "dsrl": {"hidden_dims": (24,)},
    "ifql": {"num_samples": 3},
    "qam_e": {"edit_hidden_dims": (24,)},
    "residual": {"edit_hidden_dims": (24,)},
    "sqam": {"value_penalty": 0.1},
    "best_of_n": {"num_samples": 3},
    "sac_flow": {"hidden_dims": (24,), "gate_dim": 8},
}
LEARNING = [name for name in NAMES if METHODS[name].requirements.learns_critic]
STILL = ("policy.", "one_step", "noise_actor", "edit.", "temperature", "gated_field")
"""What acts, in an update of the critic alone."""
ACTS_BY_ITS_CRITIC = {"ifql", "best_of_n", "cgql", "cgql_l"}
TRAINS_NO_BASE = {"best_of_n", "sac_flow"}


def method_of(name: str, seed: int = 0, **knobs: Any) -> OffPolicyMethod:
    torch.manual_seed(seed)
    shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (24, 24), num_flow_steps=STEPS)
    critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24, 24), 3))
    config = METHODS[name].config(**SMALL.get(name, {}) | knobs)
    return make_method(MLPFlowPolicy(shape), critic, config)


def updated(method: OffPolicyMethod, count: int, first: int = 0, **how: Any) -> OffPolicyMethod:
    for number in range(first, first + count):
        method.update(batch_of(number), torch.Generator().manual_seed(number), **how)
    return method


def state_of(method: OffPolicyMethod) -> dict[str, Tensor]:
    tensors = module_tensors(method) | optimizer_tensors(method.optimizer)
    return {name: value.clone() for name, value in tensors.items()}


def changed(method: OffPolicyMethod, before: dict[str, Tensor]) -> list[str]:
    now = state_of(method)
    return [name for name, value in now.items() if not torch.equal(value, before.get(name, value))]


def acted(method: OffPolicyMethod, which: Any = "tuned") -> Tensor:
    context = method.policy.encode(batch_of(7).observation)
    noise = GeneratorNoise(torch.Generator().manual_seed(3), BATCH, torch.device("cpu"))
    return method.actor(which).chunk(context, noise)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def a_reward(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the method that is given one: the critic of another's checkpoint."""
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "algorithm").mkdir()
    save_file(module_tensors(method_of("trqam")), folder / "algorithm/networks.safetensors")
    SMALL["reward_matching"] = {"reward_path": folder}


def test_the_registry_knows_a_method_by_its_knobs(name: str) -> None:
    config = METHODS[name].config()
    assert name_of(config) == name
    assert requirements_of(config) is METHODS[name].requirements


def test_what_was_saved_goes_on_to_the_same_bits(name: str) -> None:
    method = updated(method_of(name), 3)
    fresh = method_of(name, seed=1)
    load_module_tensors(fresh, {k: v.clone() for k, v in module_tensors(method).items()})
    moments = {k: v.clone() for k, v in optimizer_tensors(method.optimizer).items()}
    load_optimizer_tensors(fresh.optimizer, moments)
    fresh.load_scalars(method.scalars())
    updated(method, 2, first=3)
    updated(fresh, 2, first=3)
    assert changed(fresh, state_of(method)) == []
    assert fresh.scalars() == method.scalars()
    assert torch.equal(acted(fresh), acted(method))


def test_micro_batches_make_the_same_update_in_less_memory(name: str) -> None:
    whole, parts = updated(method_of(name), 3), updated(method_of(name), 3, num_parts=4)
    expected, found = module_tensors(whole), module_tensors(parts)
    for key, value in expected.items():
        assert torch.allclose(found[key].float(), value.float(), atol=2e-5), key
    if whole.next_action is not None:
        assert parts.next_action is not None
        assert torch.allclose(parts.next_action, whole.next_action, atol=1e-4)
    with pytest.raises(UserError, match=f"cannot be split in {BATCH + 1}"):
        updated(method_of(name), 1, num_parts=BATCH + 1)


def test_the_size_of_q_that_fql_may_divide_by_is_the_joint_batchs() -> None:
    knobs = {"normalize_q_loss": True, "alpha": 0.1}
    whole = updated(method_of("fql", **knobs), 1)
    parts = updated(method_of("fql", **knobs), 1, num_parts=BATCH)
    plain = updated(method_of("fql", alpha=0.1), 1)
    expected, found = (
        {n: p.grad for n, p in method.own.named_parameters()} for method in (whole, parts)
    )
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key
    others = {n: p.grad for n, p in plain.own.named_parameters()}
    assert any(not torch.allclose(others[key], value, rtol=0.1) for key, value in expected.items())


def test_a_loss_that_is_not_finite_moves_nothing(name: str) -> None:
    method = updated(method_of(name), 2)
    before, scalars = state_of(method), method.scalars()
    bad = batch_of(3)
    # What every method reads; a return is read by those that learn a critic.
    spoilt = bad.chunk_return if name in LEARNING else bad.observation
    spoilt[4] = torch.nan
    for update in (method.update, method.update_critic)[: 1 + (name in LEARNING)]:
        with pytest.raises(DivergenceError, match="diverged"):
            update(bad, torch.Generator().manual_seed(0))
    assert changed(method, before) == []
    assert method.scalars() == scalars


@pytest.mark.parametrize("name", LEARNING)
def test_the_critic_alone_moves_and_what_acts_stays(name: str) -> None:
    method = updated(method_of(name), 1)
    before, action = state_of(method), acted(method)
    critic = CriticOnly(method)
    critic.update(batch_of(5), torch.Generator().manual_seed(5))
    assert critic.metrics()["td_loss"] > 0
    moved = changed(method, before)
    assert any(key.startswith("critic.online.") for key in moved)
    assert [key for key in moved if key.startswith(STILL)] == []
    if name not in ACTS_BY_ITS_CRITIC:
        assert torch.equal(acted(method), action)


@pytest.mark.parametrize("name", LEARNING)
def test_the_critic_alone_leaves_a_training_base_and_its_mean_alone(name: str) -> None:
    if name in TRAINS_NO_BASE:
        with pytest.raises(UserError, match=f"train_base is true, but {name}"):
            method_of(name, train_base=True)
        return
    method = updated(method_of(name, train_base=True), 2)
    before = state_of(method)
    method.update_critic(batch_of(5), torch.Generator().manual_seed(5))
    assert [key for key in changed(method, before) if key.startswith("policy.")] == []


def test_the_base_acts_by_its_own_flow_and_never_changes(name: str) -> None:
    method = method_of(name)
    context = method.policy.encode(batch_of(7).observation)
    x_0 = torch.empty(BATCH, HORIZON, ACTION).normal_(generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = sample_ode(
            lambda x, tau: method.policy.base_velocity(x, tau, context), x_0, TimeGrid(STEPS)
        )
    assert torch.equal(acted(method, "base"), expected)
    updated(method, 4)
    assert torch.equal(acted(method, "base"), expected)


def test_a_policy_that_the_method_does_not_train_stays_as_it_came(name: str) -> None:
    method = method_of(name)
    before = {k: v.clone() for k, v in method.policy.state_dict().items()}
    updated(method, 3)
    still = all(torch.equal(v, before[k]) for k, v in method.policy.state_dict().items())
    assert still == (not METHODS[name].requirements.trains_field)


def test_an_executed_chunk_that_is_asked_for_again_is_what_the_target_was_made_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the next action of an update handed in, the update and the critic's own are the same."""
    method, alone, again = method_of(name), method_of(name), method_of(name)
    method.update(batch_of(0), torch.Generator().manual_seed(0))
    if not METHODS[name].requirements.next_actions:
        assert method.next_action is None
        return
    assert method.next_action is not None
    assert method.next_action.abs().max() <= 1.0
    given = replace(batch_of(0), next_action=method.next_action)
    again.update(given, torch.Generator().manual_seed(0))
    assert changed(again, state_of(method)) == []
    alone.update_critic(given, torch.Generator().manual_seed(99))
    assert alone.critic_metrics()["target_mean"] == pytest.approx(
        method.metrics()["target_mean"], abs=1e-6
    )


def test_a_step_factor_scales_every_step(name: str) -> None:
    method = method_of(name)
    rates = [group["lr"] for group in method.optimizer.param_groups]
    method.step_factor = 0.25
    assert [group["lr"] for group in method.optimizer.param_groups] == [r / 4 for r in rates]
    assert method.scalars()["step_factor"] == 0.25


def test_every_logged_number_is_explained(name: str) -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")
    method = updated(method_of(name, train_base=name not in TRAINS_NO_BASE), 1)
    if name in LEARNING:
        method.update_critic(batch_of(1), torch.Generator().manual_seed(1))
    logged = method.metrics().keys() | method.critic_metrics().keys()
    assert [key for key in logged if f"`{key}`" not in page] == []

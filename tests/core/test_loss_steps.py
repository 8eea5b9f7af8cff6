"""The loss on m of K flow steps: the whole loss's gradient on average, and what it spares."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from update_problems import STEPS, batch_of, noise_of
from update_problems import method_of as trqam_of
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import chosen_kernels
from vla_trqam.methods.external_kl import ExternalKL, ExternalKLConfig
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig


def gradient(method: TRQAM, chosen: tuple[int, ...] | None) -> dict[str, Tensor]:
    method.loss.zero_grad(set_to_none=True)
    method.loss(batch_of(), replace(noise_of(), loss_steps=chosen), 2.0).loss.backward()
    named = method.loss.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def external() -> TRQAM:
    torch.manual_seed(0)
    policy = MLPFlowPolicy(MLPFlowConfig(5, 3, 2, (24, 24), num_flow_steps=STEPS))
    with torch.no_grad():
        for parameter in policy.tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    critic = Critic(CriticEnsemble(5, 6, (24, 24), 3))
    return ExternalKL(policy, critic, ExternalKLConfig())


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("make", [trqam_of, external])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_over_all_choices_the_gradient_is_that_of_the_whole_loss(
    kernels: Any, make: Any, count: int
) -> None:
    with chosen_kernels(kernels):
        method = make()
        whole = gradient(method, None)
        choices = list(combinations(range(STEPS), count))
        found = [gradient(method, chosen) for chosen in choices]
    for name, expected in whole.items():
        mean = torch.stack([one[name] for one in found]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=2e-4, atol=2e-6, msg=name)


def test_all_steps_asked_for_is_the_loss_as_it_was() -> None:
    plain, said = trqam_of(), trqam_of(TRQAMConfig(loss_steps=STEPS))
    for seed in range(3):
        plain.update(batch_of(seed), torch.Generator().manual_seed(seed))
        said.update(batch_of(seed), torch.Generator().manual_seed(seed))
    first, second = plain.loss.state_dict(), said.loss.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_every_set_of_steps_is_as_likely() -> None:
    method = trqam_of(TRQAMConfig(loss_steps=2))
    generator = torch.Generator().manual_seed(0)
    action = batch_of().action
    drawn = [method.loss.draw(action, STEPS, generator).loss_steps for _ in range(3000)]
    sets = list(combinations(range(STEPS), 2))
    counts = torch.tensor([drawn.count(chosen) for chosen in sets], dtype=torch.float64)
    assert int(counts.sum()) == len(drawn)
    expected = len(drawn) / len(sets)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 14 + 4 * (2 * 14) ** 0.5


def test_the_kl_is_measured_on_all_steps() -> None:
    method = trqam_of()
    whole = method.loss(batch_of(), noise_of(), 2.0)
    part = method.loss(batch_of(), replace(noise_of(), loss_steps=(1, 3)), 2.0)
    assert torch.equal(part.kl_per_step, whole.kl_per_step)
    assert torch.equal(part.adjoint, whole.adjoint)


def test_only_the_chosen_steps_keep_a_graph() -> None:
    with chosen_kernels("plain"):
        method = trqam_of()
        seen: list[bool] = []
        policy = method.policy
        velocity = policy.velocity

        def watched(x: Tensor, tau: Tensor, context: Any) -> Tensor:
            value = velocity(x, tau, context)
            seen.append(value.requires_grad)
            return value

        policy.velocity = watched  # type: ignore[method-assign]
        method.loss(batch_of(), replace(noise_of(), loss_steps=(1, 3)), 2.0)
    # At every step the path's evaluation, and the next action's.
    assert seen == [flag for i in range(STEPS) for flag in (i in (1, 3), False)]


@pytest.mark.parametrize("count", [0, -1])
def test_no_step_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"loss_steps is {count}; it must be at least 1"):
        TRQAMConfig(loss_steps=count)


def test_more_steps_than_there_are_is_refused_by_settings_and_method() -> None:
    config = TRQAMConfig(loss_steps=STEPS + 1)
    with pytest.raises(UserError, match=f"fewer than the {STEPS + 1} flow steps"):
        config.check_flow_steps(STEPS)
    with pytest.raises(UserError, match=f"loss_steps is {STEPS + 1}; the policy has {STEPS}"):
        trqam_of(config)


def test_the_preflight_counts_the_activations_of_the_steps_that_keep_any() -> None:
    from vla_trqam.preflight.memory import saved_bytes

    policy = trqam_of().policy
    context = policy.encode(batch_of().observation)
    kept = []
    with chosen_kernels("plain"):
        for steps in (None, 2):
            with saved_bytes(set()) as saved:
                TRQAMConfig(loss_steps=steps).rehearse(policy, context, len(context))
            kept.append(sum(saved.values()))
    assert kept[1] < 0.8 * kept[0]

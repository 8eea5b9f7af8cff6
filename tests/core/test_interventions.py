"""Where a person took over, the tuned field clones; where nobody did, nothing changes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from update_problems import ACTION, BATCH, HORIZON, batch_of, method_of, noise_of

from vla_trqam.data.transitions import tells_interventions
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Offers
from vla_trqam.methods.registry import check_served
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

WEIGHT = 0.7


def taken(*where: tuple[int, int]) -> Tensor:
    column = torch.zeros(BATCH, HORIZON, dtype=torch.bool)
    for row, step in where:
        column[row, step] = True
    return column


def tuned_gradient(method: TRQAM, batch: Any) -> list[Tensor]:
    method.loss.zero_grad(set_to_none=True)
    method.loss(batch, noise_of(), 2.0).loss.backward()
    return [p.grad.clone() for p in method.policy.trainable_parameters() if p.grad is not None]


def test_a_column_of_several_arms_tells_of_any() -> None:
    both = torch.stack((taken((0, 1)), taken((3, 0), (0, 1))), dim=-1)
    found = batch_of(columns={"is_intervention": both}).intervened
    assert torch.equal(found, taken((0, 1), (3, 0)))


def test_the_term_is_the_naive_loop_over_the_actions_that_were_taken() -> None:
    where = [(0, 1), (3, 0), (3, 1), (7, 0)]
    batch = batch_of(columns={"is_intervention": taken(*where)})
    noise, method = noise_of(), method_of(TRQAMConfig(clone_interventions=WEIGHT))
    policy, total = method.policy, 0.0
    context = policy.encode(batch.observation)
    for row, step in where:
        tau = noise.bc_tau[row]
        x = (1 - tau) * noise.bc_x_0[row] + tau * batch.action[row]
        v = policy.velocity(x[None], tau[None], context[row : row + 1])[0]
        error = v[step] - (batch.action[row, step] - noise.bc_x_0[row, step])
        total = total + error.square().sum() / (BATCH * HORIZON * ACTION)
    found = method.loss(batch, noise, 2.0)
    value = float(torch.as_tensor(total).detach())
    assert float(found.more["intervention_loss"]) == pytest.approx(value, rel=1e-5)
    plain = method_of().loss(batch, noise, 2.0)
    assert float(found.loss - plain.loss) == pytest.approx(WEIGHT * value, rel=1e-4)
    term = torch.autograd.grad(WEIGHT * total, [*policy.trainable_parameters()])
    both, alone = tuned_gradient(method, batch), tuned_gradient(method_of(), batch)
    for mine, without, expected in zip(both, alone, term, strict=True):
        torch.testing.assert_close(mine - without, expected, rtol=1e-3, atol=1e-6)


def test_without_an_intervention_the_update_is_as_it_was() -> None:
    batch = batch_of(columns={"intervention": taken()})
    asked = tuned_gradient(method_of(TRQAMConfig(clone_interventions=WEIGHT)), batch)
    for mine, plain in zip(asked, tuned_gradient(method_of(), batch), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-8)


def test_what_comes_after_the_episodes_end_was_taken_by_nobody() -> None:
    valid = torch.ones(BATCH, HORIZON, dtype=torch.bool)
    valid[3, 1] = False
    batch = batch_of(columns={"a.b.intervention": taken((3, 0), (3, 1)).long()}, valid=valid)
    assert batch.intervened is not None
    assert batch.intervened.nonzero().tolist() == [[3, 0]]
    assert batch_of().intervened is None


def test_any_of_several_columns_tells() -> None:
    columns = {"intervention": taken((0, 0)), "x.is_intervention": taken((1, 1))}
    found = batch_of(columns=columns).intervened
    assert found is not None
    assert found.nonzero().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        ("intervention", True),
        ("complementary_info.is_intervention", True),
        ("interventions", False),
        ("is_intervention.raw", False),
    ],
)
def test_a_column_is_known_by_its_last_part(name: str, tells: bool) -> None:
    assert tells_interventions(name) == tells


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_that_means_nothing_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match="clone_interventions is"):
        TRQAMConfig(clone_interventions=weight)


def test_a_recipe_whose_data_cannot_tell_is_refused() -> None:
    config = TRQAMConfig(clone_interventions=1.0)
    check_served(config, Offers(training_base=False, interventions=True))
    with pytest.raises(UserError, match="LeRobotDatasets may"):
        check_served(config, Offers(training_base=True))

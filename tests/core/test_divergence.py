"""A number that is not finite stops an update before anything has moved."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from update_problems import batch_of, method_of, noise_of

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import DivergenceError
from vla_trqam.methods.parts import adjoint_matching
from vla_trqam.methods.parts.finite import check_finite, measured
from vla_trqam.methods.parts.parallel import Ranks
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig

BASE_IN_TRAINING = TRQAMConfig(train_base=True, base_ema_rate=0.3)


def everything(method: TRQAM) -> dict[str, Any]:
    """All that an update moves."""
    return {
        "weights": copy.deepcopy(method.loss.state_dict()),
        "moments": copy.deepcopy(method.optimizer.state_dict()),
        "region": method.trust_region.state_dict(),
    }


def unchanged(method: TRQAM, before: dict[str, Any]) -> bool:
    after = everything(method)
    moved = [
        name for name, v in after["weights"].items() if not torch.equal(v, before["weights"][name])
    ]
    states = after["moments"]["state"], before["moments"]["state"]
    assert states[0].keys() == states[1].keys()
    moved += [
        f"{number}.{name}"
        for number, state in states[0].items()
        for name, v in state.items()
        if not torch.equal(v, states[1][number][name])
    ]
    assert moved == []
    return bool(after["region"] == before["region"])


def spoilt(value: float, row: int = 0) -> TransitionBatch:
    batch = batch_of(5)
    returns = batch.chunk_return.clone()
    returns[row] = value
    return replace(batch, chunk_return=returns)


def spoil_gradient(parameter: Tensor, value: float) -> Any:
    return parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


def started(config: TRQAMConfig | None = None) -> TRQAM:
    method = method_of(config)
    method.update_with(batch_of(0), noise_of(0))
    return method


@pytest.mark.parametrize("config", [None, BASE_IN_TRAINING, TRQAMConfig(shared_optimizer=True)])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_loss_that_is_not_finite_moves_nothing(value: float, config: TRQAMConfig | None) -> None:
    method = started(config)
    before, lam = everything(method), method.trust_region.lam
    said = f"the loss is (nan|inf) at lambda {lam:.3g}"
    with pytest.raises(DivergenceError, match=said):
        method.update_with(spoilt(value), noise_of(1))
    assert unchanged(method, before)
    with pytest.raises(DivergenceError, match=said):
        method.update_critic_with(spoilt(value), noise_of(1))
    assert unchanged(method, before)
    method.update_with(batch_of(1), noise_of(1))
    assert all(bool(v.isfinite().all()) for v in method.loss.state_dict().values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("who", "pick"),
    [
        ("actor", lambda method: next(method.policy.trainable_parameters())),
        ("critic", lambda method: next(method.critic.online.parameters())),
    ],
)
def test_a_gradient_that_is_not_finite_moves_nothing(
    value: float, who: str, pick: Callable[[TRQAM], Tensor]
) -> None:
    method = started(BASE_IN_TRAINING)
    before = everything(method)
    hook = spoil_gradient(pick(method), value)
    with pytest.raises(DivergenceError, match=f"the {who}'s gradient norm is {value}"):
        method.update_with(batch_of(1), noise_of(1))
    assert unchanged(method, before)
    if who == "critic":
        with pytest.raises(DivergenceError, match=f"the critic's gradient norm is {value}"):
            method.update_critic_with(batch_of(1), noise_of(1))
        assert unchanged(method, before)
    hook.remove()
    method.update_with(batch_of(1), noise_of(1))


def test_a_joint_gradient_norm_is_not_called_the_critics() -> None:
    method = started(TRQAMConfig(shared_optimizer=True))
    spoil_gradient(next(method.policy.trainable_parameters()), math.nan)
    with pytest.raises(DivergenceError, match="the joint gradient norm of actor and critic is nan"):
        method.update_with(batch_of(1), noise_of(1))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_path_kl_that_is_not_finite_moves_nothing_though_the_loss_is(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = started()
    before = everything(method)
    measure = adjoint_matching.path_kl_per_step

    def spoil(gap: Tensor, grid: Any) -> Tensor:
        return torch.full_like(measure(gap, grid), value)

    monkeypatch.setattr(adjoint_matching, "path_kl_per_step", spoil)
    with pytest.raises(DivergenceError, match=f"the path KL is {value} at lambda"):
        method.update_with(batch_of(1), noise_of(1))
    assert unchanged(method, before)


def test_one_bad_micro_batch_stops_the_whole_update() -> None:
    method = started()
    before = everything(method)
    with pytest.raises(DivergenceError):
        method.update_in_parts([(batch_of(1), noise_of(1)), (spoilt(math.nan), noise_of(2))])
    assert unchanged(method, before)


def test_a_rank_with_good_numbers_stops_with_the_one_that_has_bad_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    ranks.count = 2
    monkeypatch.setattr(ranks, "_gathered", lambda own: [list(own), [math.nan] * len(own)])
    found = measured(ranks, {"the loss": ([torch.tensor(1.0)], [1.0])})
    with pytest.raises(DivergenceError, match="the loss is nan"):
        check_finite(found)


def test_what_is_looked_at_is_the_weighted_sum_over_micro_batches() -> None:
    parts = [torch.tensor(2.0), torch.tensor(5.0)]
    found = measured(Ranks(), {"a": (parts, [0.25, 0.75]), "b": ([torch.tensor(7.0)], [1.0])})
    assert found == {"a": 0.25 * 2.0 + 0.75 * 5.0, "b": 7.0}


def test_a_step_factor_scales_both_step_sizes_and_no_more() -> None:
    config = TRQAMConfig(actor_lr=1e-3, critic_lr=2e-3)
    half, plain = method_of(config), method_of(replace(config, actor_lr=5e-4, critic_lr=1e-3))
    half.step_factor = 0.5
    for step in range(2):
        half.update_with(batch_of(step), noise_of(step))
        plain.update_with(batch_of(step), noise_of(step))
    first, second = half.loss.state_dict(), plain.loss.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []

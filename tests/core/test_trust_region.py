import json
import math
from typing import Any

import pytest

from vla_trqam.errors import UserError
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.trqam import TRQAMConfig
from vla_trqam.time_grid import ShiftedEuler
from vla_trqam.trust_region import TrustRegion, TrustRegionConfig


def region_of(chunk_length: int = 1, **changes: Any) -> TrustRegion:
    return TrustRegion(TrustRegionConfig(**changes), chunk_length)


def test_the_defaults_are_the_authors_with_their_factor_of_three_absorbed() -> None:
    config, scale = TrustRegionConfig(), 3.0
    assert config.lam_init == 1.0 * scale
    assert config.dual_step_size == pytest.approx(0.01 * scale)
    assert (config.lam_min, config.lam_max) == pytest.approx((0.01 * scale, 100 * scale))
    assert (config.kl_ema_rate, config.kl_clip) == (0.1, 2.0)
    assert config.kl_per_action


def test_one_step_is_the_formula() -> None:
    region = region_of(kl_budget=0.5, lam_init=2.0, dual_step_size=0.2, kl_ema_rate=0.25)
    region.update(0.8)
    ema = 0.75 * 0.0 + 0.25 * 0.8
    assert region.kl_ema == pytest.approx(ema)
    assert region.lam == pytest.approx(2.0 + 0.2 * (ema - 0.5))
    region.update(0.4)
    ema_2 = 0.75 * ema + 0.25 * 0.4
    assert region.kl_ema == pytest.approx(ema_2)
    assert region.lam == pytest.approx(2.0 + 0.2 * (ema - 0.5) + 0.2 * (ema_2 - 0.5))


def test_a_relative_step_is_the_formula() -> None:
    region = region_of(
        kl_budget=0.5, lam_init=2.0, dual_step_size=0.2, kl_ema_rate=0.25, dual_steps="relative"
    )
    region.update(0.8)
    assert region.lam == pytest.approx(2.0 * math.exp(0.2 * (0.25 * 0.8 / 0.5 - 1.0)))


def test_a_relative_step_of_a_huge_kl_ends_at_the_bound() -> None:
    assert region_after(1e9, kl_clip=None, dual_steps="relative").lam == pytest.approx(300.0)


@pytest.mark.parametrize("budget", [0.1, 1.0, 4.0])
def test_relative_steps_settle_at_any_budget_where_additive_ones_swing(budget: float) -> None:
    """A policy whose KL follows 1 / lambda^2 slowly, as TRQAM's does at its optimum."""

    def spread(dual_steps: str) -> float:
        region = region_of(kl_budget=budget, lam_init=3.0, dual_steps=dual_steps, lam_min=1e-3)
        kl, seen = 0.0, []
        for _ in range(20_000):
            kl += 0.01 * (0.06 / region.lam**2 - kl)
            region.update(kl)
            seen.append(region.kl_ema / budget)
        return max(seen[10_000:]) - min(seen[10_000:])

    assert spread("relative") < 1e-3
    if budget == 4.0:
        assert spread("additive") > 0.5


def test_too_much_kl_raises_lambda_and_too_little_lowers_it() -> None:
    region = region_of(kl_budget=1.0, kl_ema_rate=1.0)
    region.update(1.5)
    raised = region.lam
    assert raised > region.config.lam_init
    region.update(0.5)
    assert region.lam < raised


def test_the_estimate_is_clipped_before_the_average() -> None:
    assert region_after(1e9, kl_budget=0.5, kl_clip=2.0).kl_ema == pytest.approx(0.1 * 1.0)
    assert region_after(1e300, kl_budget=0.5, kl_clip=3.0).kl_ema == pytest.approx(0.1 * 1.5)
    assert region_after(1e9, kl_budget=0.5, kl_clip=None).kl_ema == pytest.approx(1e8)


def region_after(estimate: float, **changes: Any) -> TrustRegion:
    region = region_of(**changes)
    region.update(estimate)
    return region


def test_lambda_stays_within_its_bracket_and_comes_back() -> None:
    region = region_of(kl_budget=1.0, lam_init=1.0, lam_min=0.9, lam_max=1.1, kl_ema_rate=1.0)
    for _ in range(20):
        region.update(2.0)
    assert region.lam == 1.1
    for _ in range(20):
        region.update(0.0)
    assert region.lam == 0.9
    region.update(2.0)
    assert region.lam > 0.9


def test_the_kl_is_divided_by_the_chunk_length_where_asked() -> None:
    assert region_of(5).in_budget_units(10.0) == 2.0
    assert region_of(5, kl_per_action=False).in_budget_units(10.0) == 10.0


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("estimate", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_ends_training_and_leaves_lambda(
    estimate: float, clip: float | None
) -> None:
    region = TrustRegion(TrustRegionConfig(kl_clip=clip), 1)
    before = region.state_dict()
    with pytest.raises(FloatingPointError, match="diverged"):
        region.update(estimate)
    assert region.state_dict() == before


def test_a_frozen_dual_keeps_lambda_and_still_averages() -> None:
    region = region_of(dual_step_size=0.0, kl_budget=0.1)
    region.update(0.2)
    assert region.lam == region.config.lam_init
    assert region.kl_ema == pytest.approx(0.02)


def test_the_state_survives_json_to_the_bit() -> None:
    region = region_of(kl_budget=0.7)
    for estimate in (0.1, 1 / 3, 0.9, 2.7):
        region.update(estimate)
    other = region_of(kl_budget=0.7)
    other.load_state_dict(json.loads(json.dumps(region.state_dict())))
    for estimate in (0.3, 1.1):
        region.update(estimate)
        other.update(estimate)
    assert (other.lam, other.kl_ema) == (region.lam, region.kl_ema)
    assert region.lam != region.config.lam_init


BAD_KNOBS: list[dict[str, Any]] = [
    {"kl_budget": 0.0},
    {"kl_budget": -1.0},
    {"kl_budget": math.nan},
    {"lam_init": 1000.0},
    {"lam_init": 0.001},
    {"lam_min": 0.0},
    {"lam_init": math.nan},
    {"dual_step_size": -0.01},
    {"dual_steps": "log"},
    {"dual_step_size": math.nan},
    {"kl_ema_rate": 0.0},
    {"kl_ema_rate": 1.1},
    {"kl_clip": 1.0},
    {"kl_clip": math.nan},
    {"time_shift": 0.0, "scheme": "shifted_euler"},
    {"time_shift": 2.0, "scheme": "shifted_euler"},
    {"final_step": "noisy", "scheme": "shifted_euler"},
    {"adjoint_time": "later", "scheme": "shifted_euler"},
    {"scheme": "euler"},
    {"adjoint": "fat"},
    {"last_step_weight": 0.0},
    {"last_step_weight": math.nan},
    {"actor_lr": 0.0},
    {"critic_lr": -1e-4},
    {"max_grad_norm": 0.0},
    {"base_ema_rate": 1.5},
]


@pytest.mark.parametrize("knobs", BAD_KNOBS, ids=str)
def test_a_knob_that_cannot_be_honoured_is_refused_by_name(knobs: dict[str, Any]) -> None:
    name, value = next(iter(knobs.items()))
    with pytest.raises(UserError) as error:
        TRQAMConfig(**knobs)
    assert name in str(error.value)
    assert str(value) in str(error.value)
    assert "belongs to" not in str(error.value)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_qam_refuses_a_temperature_that_is_not_positive(beta: float) -> None:
    with pytest.raises(UserError, match="inverse_temperature is"):
        qam_config(TRQAMConfig(), beta)


def test_qam_is_lambda_frozen_at_one_with_every_other_knob_kept() -> None:
    given = TRQAMConfig(
        lam_init=5.0, lam_min=2.0, actor_lr=1e-5, scheme="shifted_euler", adjoint_time="same"
    )
    config = qam_config(given, 10.0)
    assert (config.lam_init, config.dual_step_size, config.inverse_temperature) == (1.0, 0.0, 10.0)
    assert (config.actor_lr, config.adjoint_time) == (1e-5, "same")
    assert config.chain == ShiftedEuler(adjoint_time="same")
    region = TrustRegion(config, 1)
    region.update(100.0)
    assert region.lam == 1.0

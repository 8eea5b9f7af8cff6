import numpy as np
import pytest

from vla_trqam.envs.robomimic.demonstrators.operators import (
    OPERATOR_NAMES,
    draw_operator,
    operator_names,
)
from vla_trqam.errors import UserError


def test_mixed_is_all_six_operators_and_a_quality_is_its_two() -> None:
    assert operator_names("mixed") == OPERATOR_NAMES
    assert operator_names("worse") == ("worse_operator_1", "worse_operator_2")
    assert operator_names("okay_operator_2") == ("okay_operator_2",)


def test_unknown_operators_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UserError, match=r"'expert' is not known.*mixed, better, okay, worse"):
        operator_names("expert")


def test_an_operator_is_a_function_of_the_generators_seed() -> None:
    first, again, other = (
        draw_operator("okay_operator_1", np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_drawn_numbers_stay_within_what_a_hand_can_do(name: str) -> None:
    for seed in range(50):
        operator = draw_operator(name, np.random.default_rng(seed))
        assert 0.0 < operator.speed <= 1.0
        assert np.abs(operator.grasp_offset).max() <= 0.015
        assert operator.name.startswith(operator.quality)


def test_operators_get_noisier_and_slower_from_better_to_worse() -> None:
    better, okay, worse = (
        draw_operator(f"{quality}_operator_1", np.random.default_rng(0))
        for quality in ("better", "okay", "worse")
    )
    assert better.noise < okay.noise < worse.noise
    assert better.speed > okay.speed > worse.speed
    assert better.miss_rate < okay.miss_rate < worse.miss_rate

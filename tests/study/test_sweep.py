"""Which budget is recommended."""

import pytest

from vla_trqam.study.sweep import recommend


def test_the_smallest_budget_within_one_standard_error_of_the_best_is_recommended():
    success = {0.1: [0.5, 0.5], 0.5: [0.78, 0.82], 1.0: [0.75, 0.95], 2.0: [0.6, 0.6]}
    chosen, reason = recommend(success)
    assert chosen == 0.5  # 0.85 - 0.1 is less than its 0.8
    assert reason == "80.0%, the smallest within one standard error of the best, 85.0% at 1"


def test_the_best_budget_is_recommended_where_smaller_ones_are_worse():
    chosen, reason = recommend({0.1: [0.1, 0.1], 1.0: [0.9, 0.9]})
    assert (chosen, reason) == (1.0, "the best mean success, 90.0%")


def test_of_equal_budgets_the_smallest_is_recommended():
    assert recommend({0.5: [0.0, 0.0], 1.0: [0.0, 0.0]})[0] == 0.5


@pytest.mark.parametrize("rates", [[0.4], [0.4, 0.4, 0.4]])
def test_a_budget_alone_is_recommended_whatever_its_seeds(rates):
    assert recommend({0.3: rates})[0] == 0.3

"""Which budget is recommended."""

import pytest

from vla_trqam.study.sweep import recommend


def test_the_smallest_budget_within_one_standard_error_of_the_best_is_recommended():
    success = {0.1: [0.5, 0.5], 0.5: [0.78, 0.82], 1.0: [0.75, 0.95], 2.0: [0.6, 0.6]}
    chosen, reason = recommend(success, 0.2)
    assert chosen == 0.5  # 0.85 - 0.1 is less than its 0.8
    assert reason == "80.0%, the smallest within one standard error of the best, 85.0% at 1"


def test_the_error_is_that_of_a_mean_of_so_few():
    """Rates of 0.6, 0.8 and 1: a standard deviation of 0.2 (of n - 1), over the root of 3 0.115."""
    best = {1.0: [0.6, 0.8, 1.0]}
    inside, outside = 0.8 - 0.2 / 3**0.5 + 0.01, 0.8 - 0.2 / 3**0.5 - 0.01
    assert recommend({0.1: [inside] * 3, **best}, 0.2)[0] == 0.1
    assert recommend({0.1: [outside] * 3, **best}, 0.2)[0] == 1.0


def test_the_best_budget_is_recommended_where_smaller_ones_are_worse():
    chosen, reason = recommend({0.1: [0.1, 0.1], 1.0: [0.9, 0.9]}, 0.05)
    assert (chosen, reason) == (1.0, "the best mean success, 90.0%")


def test_of_equal_budgets_the_smallest_is_recommended():
    assert recommend({0.5: [0.4, 0.4], 1.0: [0.4, 0.4]}, 0.2)[0] == 0.5


def test_no_budget_is_recommended_where_none_is_better_than_the_base():
    chosen, reason = recommend({0.5: [0.1, 0.1], 1.0: [0.2, 0.2]}, 0.2)
    assert chosen is None
    assert reason == "the best, 20.0%, is not above the base's 20.0%"


@pytest.mark.parametrize("rates", [[0.4], [0.4, 0.4, 0.4]])
def test_a_budget_alone_is_recommended_whatever_its_seeds(rates):
    assert recommend({0.3: rates}, 0.2)[0] == 0.3


def test_a_budget_that_lacks_a_run_is_not_recommended():
    """The other two of its seeds may have diverged."""
    chosen, reason = recommend({0.5: [0.90, 0.92, 0.91], 4.0: [1.0]}, 0.6)
    assert chosen == 0.5
    assert reason == "the best mean success, 91.0%; 4 left aside, for runs lack"

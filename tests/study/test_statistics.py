"""The statistics against naive loops and known values."""

import itertools

import numpy as np
import pytest
from rliable import metrics
from scipy import stats

from vla_trqam.study.statistics import (
    compare_pairs,
    holm,
    improvements,
    interquartile_means,
    mean_interval,
    mean_p,
    performance_profiles,
    probability_of_improvement,
    rank_correlation,
    rate_interval,
    sign_flip_p,
    spearman,
)

pytestmark = pytest.mark.usefixtures("few_replicates")
RNG = np.random.default_rng(3)
SCORES = {
    "a": np.array([[0.9, 0.8], [0.7, 0.9], [0.8, 0.6]]),
    "b": np.array([[0.5, 0.8], [0.4, 0.7], [0.6, 0.2]]),
    "c": np.array([[0.1, 0.0], [0.2, 0.1], [0.0, 0.3]]),
}


def test_the_interquartile_mean_is_that_of_the_middle_half_of_all_runs():
    found = interquartile_means(SCORES)
    for name, scores in SCORES.items():
        runs = sorted(scores.ravel())
        assert found[name].value == pytest.approx(np.mean(runs[1:-1]))  # a quarter of 6 is one
        assert found[name].value in found[name].interval
    assert found["c"].interval.high < found["a"].interval.low


def test_the_intervals_can_be_repeated_and_leave_numpys_generator_alone():
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    one, other = (interquartile_means(SCORES) for _ in range(2))
    assert one == other
    assert (np.random.get_state()[1] == before).all()


def test_the_probability_of_improvement_counts_pairs_of_runs_and_halves_ties():
    found = improvements(SCORES, "a")
    assert found.keys() == {"b", "c"}
    for name in ("b", "c"):
        wins = [
            (x > y) + 0.5 * (x == y)
            for task in range(2)
            for x, y in itertools.product(SCORES["a"][:, task], SCORES[name][:, task])
        ]
        assert found[name].value == pytest.approx(np.mean(wins))
    assert found["c"].value == 1.0


def test_the_probability_of_improvement_is_rliables():
    one, other = RNG.integers(0, 5, (4, 7)) / 4, RNG.integers(0, 5, (3, 7)) / 4
    expected = metrics.probability_of_improvement(one, other)
    assert probability_of_improvement(one, other) == pytest.approx(expected, abs=1e-12)


def test_one_seed_has_no_interval():
    alone = {name: scores[:1] for name, scores in SCORES.items()}
    found = [*interquartile_means(alone).values(), *improvements(alone, "a").values()]
    assert all(np.isnan([one.interval.low, one.interval.high]).all() for one in found)
    assert not np.isnan([one.value for one in found]).any()
    profile = performance_profiles(alone)["a"]
    assert np.isnan(profile.low).all()
    assert not np.isnan(profile.share).any()


def test_a_profile_is_the_share_of_runs_above_a_success():
    found = performance_profiles(SCORES)["a"]
    for threshold, share in zip(found.thresholds, found.share, strict=True):
        assert share == pytest.approx(np.mean(SCORES["a"] > threshold))
    assert (found.low <= found.share + 1e-12).all()
    assert (found.share <= found.high + 1e-12).all()


def test_the_sign_flip_test_counts_all_signs():
    differences = np.array([0.3, 0.1, 0.2, -0.05, 0.4])
    mean = abs(differences.mean())
    flipped = [
        abs(np.mean(differences * signs)) >= mean - 1e-12
        for signs in itertools.product([1, -1], repeat=5)
    ]
    assert sign_flip_p(differences) == pytest.approx(np.mean(flipped))
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.array([0.5])) == 1.0


def test_holm_is_the_step_down_of_the_book():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    from statsmodels.stats.multitest import multipletests

    p = RNG.uniform(0, 0.1, 12)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_equal_methods_are_not_told_apart_and_far_ones_are():
    base = RNG.uniform(0.3, 0.5, (3, 5))
    scores = {"good": base + 0.3, "bad": base, "same": base + RNG.normal(0, 0.01, (3, 5))}
    found = {(pair.one, pair.other): pair for pair in compare_pairs(scores)}
    assert found["good", "bad"].told_apart
    assert found["good", "bad"].difference == pytest.approx(0.3)
    assert found["good", "bad"].p == pytest.approx(2 / 2**15), "all signs were tried"
    assert not found["bad", "same"].told_apart
    assert all(pair.corrected_p >= pair.p for pair in found.values())


def test_two_seeds_of_one_task_tell_nothing_apart():
    found = compare_pairs({"a": np.ones((2, 1)), "b": np.zeros((2, 1))})
    assert not found[0].told_apart
    assert found[0].p == pytest.approx(0.5)


def test_the_interval_of_a_mean_is_students_of_the_scatter_within_each_task():
    one = np.array([0.1, 0.4, 0.2])
    low, high = stats.ttest_1samp(one, 0.0).confidence_interval(0.95)
    found = mean_interval(one[:, None])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    # Tasks that differ in their means alone have the scatter of their seeds alone.
    apart = mean_interval(np.array([[0.0, 100.0], [0.0, 100.0]]))
    assert apart.low == apart.high == 50.0
    assert np.isnan(mean_interval(np.array([[0.5, 0.7]])).low)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    drawn = RNG.normal(0.0, 1.0, size=(2000, 3, 2)) + np.array([5.0, -5.0])
    inside = [0.0 in mean_interval(values) for values in drawn]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_a_rate_knows_the_noise_of_episodes_and_of_seeds():
    same, binomial = rate_interval(np.full(3, 0.5), 20), stats.binom(60, 0.5)
    assert same.low == pytest.approx(binomial.ppf(0.025) / 60, abs=0.03)
    assert same.high == pytest.approx(binomial.ppf(0.975) / 60, abs=0.03)
    far = rate_interval(np.array([0.1, 0.5, 0.9]), 20)
    assert far.high - far.low > same.high - same.low
    sure = rate_interval(np.zeros(3), 20)
    assert (sure.low, sure.high) == (0.0, 0.0)


def test_the_rank_correlation_is_spearmans_and_its_interval_holds_it():
    budget = np.repeat([0.1, 0.5, 1.0, 2.0], 3)
    effect = budget + RNG.normal(0, 0.3, 12)
    found = rank_correlation(budget, effect)
    assert found.value == pytest.approx(stats.spearmanr(budget, effect).statistic)
    assert found.value in found.interval
    assert rank_correlation(budget[::-1], effect[::-1]) == found
    assert rank_correlation(budget, budget).interval.low == pytest.approx(1.0)
    assert spearman(budget, np.zeros(12)) == 0.0


def test_the_test_of_a_mean_agrees_with_students_and_with_its_interval():
    one = RNG.normal(0.2, 0.1, 4)
    assert mean_p(one[:, None]) == pytest.approx(stats.ttest_1samp(one, 0.0).pvalue)
    for values in RNG.normal(0.1, 0.1, (50, 3, 2)):
        assert (mean_p(values) < 0.05) == (0.0 not in mean_interval(values))
    assert mean_p(np.zeros((3, 2))) == mean_p(np.array([[0.5, 0.7]])) == 1.0
    assert mean_p(np.full((3, 1), 0.25)) == 0.0

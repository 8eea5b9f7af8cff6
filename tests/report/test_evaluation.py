"""Success rates, their intervals, and the pairing of base and tuned policy."""

import dataclasses
import itertools
import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from run_results.combined_runs import combine_seeds, pigeonhole_interval
from scipy import stats

from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import (
    BaseAsItCame,
    Interval,
    PairedEvaluation,
    paired_difference_interval,
    wilson_interval,
)
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.intervals import mcnemar_exact_p
from vla_trqam.report.success import success_lines, success_table


def make_evaluation(both: int, tuned_only: int, base_only: int, neither: int) -> PairedEvaluation:
    tuned = [True] * (both + tuned_only) + [False] * (base_only + neither)
    base = [True] * both + [False] * tuned_only + [True] * base_only + [False] * neither
    count = len(base)
    return PairedEvaluation(
        np.arange(100, 100 + count), base, tuned, np.full(count, 50), np.full(count, 40)
    )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_gives_newcombes_published_limits(successes, trials, low, high):
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
    interval = wilson_interval(successes, trials)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_wilson_interval_is_wilsons_formula_for_every_count(confidence):
    z, trials = NormalDist().inv_cdf((1 + confidence) / 2), 40
    for successes in range(trials + 1):
        centre = (successes + z**2 / 2) / (trials + z**2)
        spread = math.sqrt(successes * (trials - successes) / trials + z**2 / 4)
        half_width = z * spread / (trials + z**2)
        interval = wilson_interval(successes, trials, confidence)
        expected = [centre - half_width, centre + half_width]
        np.testing.assert_allclose([interval.low, interval.high], expected, atol=1e-12)


def test_wilson_interval_ends_exactly_at_0_and_1_when_nothing_or_everything_succeeds():
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0
    assert 0 < wilson_interval(0, 7).high < 1
    assert wilson_interval(0, 7).high == pytest.approx(1 - wilson_interval(7, 7).low)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be_are_refused(successes, trials):
    with pytest.raises(ValueError, match="not a count"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(3, 5, confidence)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((20, 12, 2, 16), 0.0562, 0.3292),  # Newcombe (1998), Stat. Med. 17, 2635, method 10
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen, Laake (2014), Stat. Med. 33, 2850
        ((59, 6, 16, 80), -0.1186, -0.0046),  # the same authors' package `contingencytables`
        ((8, 3, 1, 2), -0.1574, 0.4136),  # Tang et al. (2010)
    ],
)
def test_paired_difference_interval_gives_the_published_limits(table, low, high):
    interval = paired_difference_interval(*table)
    digits = 3 if round(low, 3) == low else 4
    assert (round(interval.low, digits), round(interval.high, digits)) == (low, high)


def test_paired_difference_interval_mirrors_when_the_policies_change_places():
    there = paired_difference_interval(20, 12, 2, 16)
    back = paired_difference_interval(20, 2, 12, 16)
    assert back.low == pytest.approx(-there.high)
    assert back.high == pytest.approx(-there.low)


def test_paired_difference_interval_holds_its_estimate_and_stays_within_one_for_every_small_table():
    for table in itertools.product(range(5), repeat=4):
        if sum(table) == 0:
            continue
        interval = paired_difference_interval(*table)
        estimate = (table[1] - table[2]) / sum(table)
        assert -1 - 1e-12 <= interval.low <= estimate + 1e-12, table
        assert estimate - 1e-12 <= interval.high <= 1 + 1e-12, table


def test_paired_difference_interval_covers_the_truth_at_about_its_confidence():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.45, 0.3, 0.05, 0.2])
    tables = rng.multinomial(100, probabilities, size=1000)
    covered = [0.25 in paired_difference_interval(*map(int, table)) for table in tables]
    assert 0.935 < np.mean(covered) < 0.975


def test_mcnemar_p_is_the_exact_binomial_test_of_the_discordant_pairs():
    for gained, lost in itertools.product(range(12), repeat=2):
        discordant = gained + lost
        tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
        expected = min(1.0, 2 * tail / 2**discordant)
        assert mcnemar_exact_p(gained, lost) == pytest.approx(expected)


def test_paired_evaluation_tells_gained_lost_kept_and_failed_seeds_apart():
    evaluation = PairedEvaluation(
        seeds=[7, 3, 9, 1, 5],
        base_success=[True, True, False, False, False],
        tuned_success=[True, False, True, False, True],
        base_steps=[10, 20, 150, 150, 150],
        tuned_steps=[10, 150, 30, 150, 40],
    )
    groups = (evaluation.kept, evaluation.lost, evaluation.gained, evaluation.failed_both)
    assert [group.tolist() for group in groups] == [[7], [3], [9, 5], [1]]
    assert (evaluation.base_rate, evaluation.tuned_rate) == (0.4, 0.6)
    assert evaluation.difference == pytest.approx(0.2)


def test_paired_evaluation_takes_its_statistics_from_the_pairs():
    evaluation = make_evaluation(20, 12, 2, 16)
    assert evaluation.difference_interval() == paired_difference_interval(20, 12, 2, 16)
    assert evaluation.tuned_interval() == wilson_interval(32, 50)
    assert evaluation.base_interval(0.9) == wilson_interval(22, 50, 0.9)
    assert evaluation.mcnemar_p() == pytest.approx(stats.binomtest(2, 14).pvalue)


def test_paired_evaluation_survives_json():
    evaluation = make_evaluation(3, 4, 1, 2)
    again = PairedEvaluation.from_json(json.loads(json.dumps(evaluation.to_json())))
    for name in ("seeds", "base_success", "tuned_success", "base_steps", "tuned_steps"):
        original, copy = getattr(evaluation, name), getattr(again, name)
        assert original.dtype == copy.dtype
        np.testing.assert_array_equal(original, copy)


def with_base_as_it_came() -> PairedEvaluation:
    """Ten states; the base as it came solves the first five, with four flow steps states 2 to 7.

    The tuned policy solves 2 to 9.
    """
    state = np.arange(10)
    return PairedEvaluation(
        100 + state,
        (state >= 2) & (state < 8),
        state >= 2,
        np.full(10, 50),
        np.full(10, 40),
        BaseAsItCame(state < 5, np.full(10, 60), FlowSteps(10, 4)),
    )


def test_the_effect_of_the_flow_steps_is_told_from_that_of_tuning():
    evaluation = with_base_as_it_came()
    alone, total = evaluation.by_steps_alone(), evaluation.in_total()
    assert evaluation.difference == pytest.approx(0.2)
    assert (alone.base_rate, alone.tuned_rate) == (0.5, 0.6)
    assert (alone.gained.tolist(), alone.lost.tolist()) == ([105, 106, 107], [100, 101])
    assert (total.base_rate, total.tuned_rate) == (0.5, 0.8)
    assert alone.difference + evaluation.difference == pytest.approx(total.difference)
    assert alone.difference_interval() == paired_difference_interval(3, 3, 2, 2)
    plain = make_evaluation(1, 1, 1, 1)
    assert plain.by_steps_alone() is None
    assert plain.in_total() is None


def test_the_base_as_it_came_survives_json_and_files_without_it_are_read():
    evaluation = with_base_as_it_came()
    data = json.loads(json.dumps(evaluation.to_json()))
    entry = data["base_as_it_came"]
    assert (entry["num_flow_steps"], entry["num_flow_steps_of_base_and_tuned"]) == (10, 4)
    assert entry["rate"] == 0.5
    assert entry["interval_95"] == [*dataclasses.astuple(wilson_interval(5, 10))]
    assert entry["by_steps_alone"]["difference"] == pytest.approx(0.1)
    assert entry["in_total"]["difference"] == pytest.approx(0.3)
    again = PairedEvaluation.from_json(data).as_it_came
    np.testing.assert_array_equal(again.success, evaluation.as_it_came.success)
    np.testing.assert_array_equal(again.steps, evaluation.as_it_came.steps)
    assert again.flow_steps == FlowSteps(own=10, tuned=4)
    assert "base_as_it_came" not in make_evaluation(1, 1, 1, 1).to_json()
    del data["base_as_it_came"]
    assert PairedEvaluation.from_json(data).as_it_came is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"success": [True]}, "needs an outcome of each of 10 seeds: success 1, steps 10"),
        ({"steps": [0.5] * 10}, "steps must be a vector of int64"),
        ({"num_flow_steps": "ten"}, "ten"),
    ],
)
def test_a_base_as_it_came_of_other_states_is_refused(change, message):
    data = with_base_as_it_came().to_json()
    data["base_as_it_came"] |= change
    with pytest.raises(UserError, match=message):
        PairedEvaluation.from_json(data)
    del data["base_as_it_came"]["success"]
    with pytest.raises(UserError, match=r"base_as_it_came lacks \['success'\]"):
        PairedEvaluation.from_json(data)


def test_json_without_a_raw_field_is_refused_by_name():
    data = make_evaluation(1, 1, 1, 1).to_json()
    del data["base_success"]
    with pytest.raises(UserError, match="base_success"):
        PairedEvaluation.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "occurs twice"),
        ({"seeds": [1, 2, 3]}, "seeds 3"),
        ({"base_success": [0.5, 1]}, "base_success"),
        ({"base_steps": [1.5, 2]}, "base_steps"),
    ],
)
def test_outcomes_that_are_no_pairs_are_refused(change, message):
    good = {"seeds": [1, 2], "base_steps": [3, 4], "tuned_steps": [5, 6]}
    good |= {"base_success": [True, False], "tuned_success": [True, True]}
    PairedEvaluation(**good)
    with pytest.raises(ValueError, match=message):
        PairedEvaluation(**(good | change))
    with pytest.raises(UserError, match=message):
        PairedEvaluation.from_json(good | change)


def test_outcomes_of_an_evaluation_cannot_be_changed():
    evaluation = make_evaluation(1, 1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        evaluation.base_success[0] = False


def test_interval_says_whether_it_excludes_zero():
    assert Interval(0.1, 0.2).excludes_zero()
    assert Interval(-0.2, -0.1).excludes_zero()
    assert not Interval(-0.1, 0.2).excludes_zero()
    assert not Interval(0.0, 0.2).excludes_zero()


def test_pigeonhole_interval_equals_the_enumeration_of_all_resamples():
    values = np.random.default_rng(3).normal(size=(3, 3))
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    means = [values[np.ix_(rows, columns)].mean() for rows in draws for columns in draws]
    expected = np.quantile(means, [0.1, 0.9])
    interval = pigeonhole_interval(values, confidence=0.8, replicates=100_000)
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.02)


def test_combined_seeds_report_the_median_run_the_worst_run_and_the_pooled_difference():
    runs = [make_evaluation(5, 4, 0, 1), make_evaluation(3, 1, 2, 4), make_evaluation(5, 5, 0, 0)]
    combined = combine_seeds(runs)
    np.testing.assert_allclose(combined.tuned_rates, [0.9, 0.4, 1.0])
    np.testing.assert_allclose(combined.base_rates, [0.5, 0.5, 0.5])
    assert combined.median_tuned_rate == pytest.approx(0.9)
    assert (combined.worst_run, combined.worst_difference) == (1, pytest.approx(-0.1))
    assert combined.difference == pytest.approx((0.4 - 0.1 + 0.5) / 3)
    assert combined.difference in combined.difference_interval
    assert json.loads(json.dumps(combined.to_json()))["worst_run"] == 1


def test_combined_interval_is_wider_than_that_of_episodes_taken_as_independent():
    # One run gains everywhere, the others nowhere: 300 episodes, but three independent runs.
    runs = [
        make_evaluation(0, 100, 0, 0),
        make_evaluation(50, 0, 0, 50),
        make_evaluation(50, 0, 0, 50),
    ]
    combined = combine_seeds(runs)
    naive = paired_difference_interval(100, 100, 0, 100)
    assert combined.difference_interval.low == 0.0
    assert combined.difference_interval.high == 1.0
    assert 0 < naive.low < naive.high < 0.5


def test_combined_interval_is_reproducible_from_its_seed():
    runs = [make_evaluation(20, 12, 2, 16), make_evaluation(18, 9, 6, 17)]
    first, again = combine_seeds(runs, replicates=500), combine_seeds(runs, replicates=500)
    other = combine_seeds(runs, replicates=500, bootstrap_seed=1)
    assert first.difference_interval == again.difference_interval
    assert first.difference_interval != other.difference_interval


def test_runs_on_other_initial_states_are_not_combined():
    run = make_evaluation(1, 1, 1, 1)
    other = PairedEvaluation(
        run.seeds + 1, run.base_success, run.tuned_success, run.base_steps, run.tuned_steps
    )
    with pytest.raises(UserError, match="evaluation 1"):
        combine_seeds([run, other])
    with pytest.raises(UserError, match="no evaluation"):
        combine_seeds([])


def test_a_suites_success_is_told_by_task() -> None:
    tasks = ("open", "close", "open", "close", "open")
    evaluation = PairedEvaluation(
        seeds=np.arange(5),
        base_success=[True, False, False, False, True],
        tuned_success=[True, True, True, False, False],
        base_steps=np.full(5, 9),
        tuned_steps=np.full(5, 9),
        tasks=tasks,
    )
    found = evaluation.by_task()
    assert list(found) == ["close", "open"]
    assert found["close"].seeds.tolist() == [1, 3]
    assert (found["open"].base_rate, found["open"].tuned_rate) == (2 / 3, 2 / 3)
    assert found["open"].gained.tolist() == [2]
    assert found["open"].lost.tolist() == [4]
    again = PairedEvaluation.from_json(json.loads(json.dumps(evaluation.to_json())))
    assert again.tasks == tasks
    assert "| close | 0.0% | 50.0% | +50.0 points |" in success_table(evaluation)
    assert any(line.endswith("of 2: close") for line in success_lines(evaluation))


def test_one_task_is_not_told_twice() -> None:
    evaluation = dataclasses.replace(make_evaluation(1, 1, 1, 1), tasks=("lift",) * 4)
    assert evaluation.by_task() == {}
    assert "tasks" not in evaluation.to_json()
    assert success_table(evaluation) == success_table(make_evaluation(1, 1, 1, 1))


def test_tasks_are_as_many_as_initial_states() -> None:
    with pytest.raises(ValueError, match="3 tasks of 4 initial states"):
        dataclasses.replace(make_evaluation(1, 1, 1, 1), tasks=("lift",) * 3)

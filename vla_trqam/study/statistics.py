"""The statistics of a study: aggregates over tasks and seeds, and which variants can be told apart.

The aggregate of the field is rliable's (Agarwal et al., 2021, "Deep reinforcement learning at the
edge of the statistical precipice"): interquartile mean, performance profiles and probability of
improvement, with percentile intervals of a bootstrap over the seeds of each task.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vla_trqam.errors import UserError
from vla_trqam.report.intervals import Interval

REPLICATES = 2000
"""Of every bootstrap."""
CONFIDENCE = 0.95
ALL_SIGNS = 2**16
"""Ways to flip signs that a test tries."""
Scores = Mapping[str, NDArray[np.float64]]
"""Success by variant: (R, M), R seeds of M tasks."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval, NaN where one seed has no scatter to tell it by."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Profile:
    """Share of runs with a success above each of T thresholds.

    Attributes:
        thresholds: (T,).
        share: (T,).
        low: (T,), lower ends of the intervals.
        high: (T,), upper ends.
    """

    thresholds: NDArray[Any]
    share: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


@dataclass(frozen=True)
class Pair:
    """Two variants on the same tasks and seeds.

    Attributes:
        one: the first.
        other: the second.
        difference: mean success of the first minus the second's.
        interval: Student's, of the seeds' scatter in each task; NaN with one seed.
        p: of the sign-flip test of the mean difference, two-sided, before correction.
        corrected_p: by Holm's step-down over all pairs of the study.
    """

    one: str
    other: str
    difference: float
    interval: Interval
    p: float
    corrected_p: float

    @property
    def told_apart(self) -> bool:
        """At 5%, corrected."""
        return self.corrected_p < 1 - CONFIDENCE


def interquartile_means(scores: Scores) -> dict[str, Estimate]:
    """Mean of the middle half of all runs of a variant."""
    library, metrics = _rliable()
    with _seeded():
        values, intervals = library.get_interval_estimates(
            dict(scores),
            lambda x: np.array([metrics.aggregate_iqm(x)]),
            reps=REPLICATES,
            confidence_interval_size=CONFIDENCE,
        )
    return {
        name: Estimate(float(values[name][0]), _interval(intervals[name][:, 0], len(scores[name])))
        for name in scores
    }


def improvements(scores: Scores, over: str) -> dict[str, Estimate]:
    """Probability that a run of ``over`` beats one of each other variant on the same task.

    Ties count half; the mean over the tasks.
    """
    library, _ = _rliable()
    pairs = {name: (scores[over], scores[name]) for name in scores if name != over}
    if not pairs:
        return {}
    with _seeded():
        values, intervals = library.get_interval_estimates(
            pairs,
            probability_of_improvement,
            reps=REPLICATES,
            confidence_interval_size=CONFIDENCE,
        )
    return {
        name: Estimate(float(values[name]), _interval(np.ravel(intervals[name]), len(scores[name])))
        for name in pairs
    }


def probability_of_improvement(one: NDArray[Any], other: NDArray[Any]) -> float:
    """As rliable's, of whose test for each task a bootstrap of many tasks takes minutes.

    Args:
        one: (R, M), R seeds of M tasks.
        other: (S, M).
    """
    wins = np.sign(one[:, None] - other[None])  # (R, S, M)
    return float(0.5 + 0.5 * wins.mean())


def performance_profiles(scores: Scores) -> dict[str, Profile]:
    """Share of runs above a success, for successes from 0 to 1."""
    library, _ = _rliable()
    thresholds = np.linspace(0.0, 1.0, 51)
    with _seeded():
        shares, limits = library.create_performance_profile(
            dict(scores), thresholds, reps=REPLICATES, confidence_interval_size=CONFIDENCE
        )
    none = np.full((2, len(thresholds)), math.nan)
    bands = {n: limits[n] if len(scores[n]) > 1 else none for n in scores}
    return {n: Profile(thresholds, shares[n], bands[n][0], bands[n][1]) for n in scores}


def compare_pairs(scores: Scores) -> list[Pair]:
    """Every two variants, by the differences of their runs of one task and seed.

    The runs share base, replay and initial states, so each difference is one of methods. The test
    flips the signs of the differences: all ways of it for up to 16 runs, else that many draws.
    """
    names = list(itertools.combinations(scores, 2))
    differences = [scores[a] - scores[b] for a, b in names]
    tests = [sign_flip_p(each.ravel()) for each in differences]
    corrected = holm(tests)
    return [
        Pair(a, b, float(each.mean()), mean_interval(each), p, q)
        for (a, b), each, p, q in zip(names, differences, tests, corrected, strict=True)
    ]


def sign_flip_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean difference of pairs, of which either sign was as likely."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    found = stats.permutation_test(
        (differences,),
        lambda x, axis=-1: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=ALL_SIGNS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the smallest p times their number, and so on, never falling."""
    order = np.argsort(p_values)
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """Student's t interval of the mean of (R, M) numbers, the R of each column around its own mean.

    A percentile bootstrap of three numbers is their range: it covers three times in four at most.

    Returns:
        Both ends NaN where R is 1: one number says nothing of its scatter.
    """
    rows, columns = values.shape
    if rows < 2:
        return Interval(math.nan, math.nan)
    pooled = float(values.var(axis=0, ddof=1).mean())
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, columns * (rows - 1)) * math.sqrt(
        pooled / values.size
    )
    mean = float(values.mean())
    return Interval(mean - reach, mean + reach)


def mean_p(values: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean of 0, by the same Student's t as :func:`mean_interval`.

    Args:
        values: (R, M), the R of each column around its own mean.

    Returns:
        1 where R is 1, or where nothing differs from 0.
    """
    rows, columns = values.shape
    if rows < 2 or not np.any(values):
        return 1.0
    error = math.sqrt(float(values.var(axis=0, ddof=1).mean()) / values.size)
    if error == 0.0:
        return 0.0
    return float(2 * stats.t.sf(abs(values.mean()) / error, columns * (rows - 1)))


def rate_interval(
    rates: NDArray[np.float64], episodes: int, replicates: int = REPLICATES
) -> Interval:
    """Interval of the mean success of several seeds, of so many episodes each.

    Seeds are drawn anew, and so are the episodes of each: both make the mean uncertain.
    """
    rng = np.random.default_rng(0)
    drawn = rates[rng.integers(len(rates), size=(replicates, len(rates)))]
    return _percentiles((rng.binomial(episodes, drawn) / episodes).mean(axis=1))


def rank_correlation(cause: NDArray[np.float64], effect: NDArray[np.float64]) -> Estimate:
    """Spearman's, with a percentile interval of a bootstrap of the runs.

    Whole runs are drawn anew: drawn within each cause, few of them would vary too little, and the
    interval would lie above the number itself. In which order the runs are given does not matter.

    Args:
        cause: (N,) such as the budget of each run.
        effect: (N,).
    """
    rng = np.random.default_rng(0)
    sort = np.lexsort((effect, cause))
    cause, effect = cause[sort], effect[sort]
    drawn = rng.integers(len(cause), size=(REPLICATES, len(cause)))
    found = [spearman(cause[rows], effect[rows]) for rows in drawn]
    return Estimate(spearman(cause, effect), _percentiles(np.array(found)))


def spearman(cause: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; 0 where one of the two does not vary."""
    if len(np.unique(cause)) < 2 or len(np.unique(effect)) < 2:
        return 0.0
    return float(stats.spearmanr(cause, effect).statistic)


def _percentiles(values: NDArray[np.float64]) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _interval(pair: NDArray[np.float64], seeds: int) -> Interval:
    if seeds < 2:
        return Interval(math.nan, math.nan)
    return Interval(float(pair[0]), float(pair[1]))


def _rliable() -> tuple[Any, Any]:
    """Loaded when it is wanted: it brings pandas and takes seconds."""
    try:
        from rliable import library, metrics
    except ImportError:
        raise UserError(
            "the study's aggregate needs the package rliable, which is not here: "
            "`uv sync --extra study` installs it"
        ) from None
    logging.getLogger("absl").setLevel(logging.WARNING)
    return library, metrics


@contextmanager
def _seeded() -> Iterator[None]:
    """Of numpy's global generator, which rliable draws from whatever it is given."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)

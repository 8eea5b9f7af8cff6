"""Intervals and a test for success rates: Wilson, Newcombe's paired difference, McNemar.

Wilson's interval and McNemar's test are scipy's, Newcombe's is in no library that we keep.
Counts in, floats out.
"""

import math
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A closed interval `[low, high]`."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Whether `low <= value <= high`."""
        return self.low <= value <= self.high

    def excludes_zero(self) -> bool:
        """Whether zero lies outside, which is what "a gain" means here."""
        return 0.0 not in self


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a success rate (Wilson 1927).

    Args:
        successes: Number of successes, 0 to `trials`.
        trials: Number of episodes, at least 1.
        confidence: Two-sided coverage, between 0 and 1.

    Returns:
        The interval, within [0, 1] even when nothing or everything succeeded.

    Raises:
        ValueError: For counts or a confidence outside these ranges.
    """
    # scipy would answer NaN.
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is not a count of successes")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, not {confidence}")
    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def paired_difference_interval(
    both: int, tuned_only: int, base_only: int, neither: int, confidence: float = 0.95
) -> Interval:
    """Interval for the tuned minus the base success rate on the same initial states.

    Newcombe (1998), method 10: the two Wilson intervals are squared and added, with the correlation
    of the pairs; a positive correlation is shrunk by a continuity correction.

    Args:
        both: Initial states that both policies solve.
        tuned_only: Initial states gained.
        base_only: Initial states lost.
        neither: Initial states that neither solves.
        confidence: Two-sided coverage, between 0 and 1.

    Returns:
        The interval of the difference, within [-1, 1].

    Raises:
        ValueError: For negative counts, no pair at all, or a confidence outside (0, 1).
    """
    counts = (both, tuned_only, base_only, neither)
    if min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"{counts} is not a table of paired outcomes")
    pairs = sum(counts)
    tuned = wilson_interval(both + tuned_only, pairs, confidence)
    base = wilson_interval(both + base_only, pairs, confidence)
    tuned_rate, base_rate = (both + tuned_only) / pairs, (both + base_only) / pairs
    phi = _corrected_correlation(*counts)
    difference = tuned_rate - base_rate
    down = _square_and_add(tuned_rate - tuned.low, base.high - base_rate, phi)
    up = _square_and_add(tuned.high - tuned_rate, base_rate - base.low, phi)
    return Interval(difference - down, difference + up)


def mcnemar_exact_p(tuned_only: int, base_only: int) -> float:
    """Two-sided exact p-value of McNemar's test from the discordant pairs.

    Under "no difference" each discordant initial state goes either way with probability one half.
    """
    if min(tuned_only, base_only) < 0:
        raise ValueError(f"{(tuned_only, base_only)} are not counts")
    discordant = tuned_only + base_only
    return float(stats.binomtest(tuned_only, discordant).pvalue) if discordant else 1.0


def _corrected_correlation(both: int, tuned_only: int, base_only: int, neither: int) -> float:
    """Phi coefficient of the pairs, a positive one shrunk by n/2 in its numerator (Newcombe)."""
    margins = (both + tuned_only) * (base_only + neither) * (both + base_only)
    margins *= tuned_only + neither
    if margins == 0:
        return 0.0
    numerator: float = both * neither - tuned_only * base_only
    if numerator > 0:
        numerator = max(numerator - (both + tuned_only + base_only + neither) / 2, 0.0)
    return numerator / math.sqrt(margins)


def _square_and_add(first: float, second: float, phi: float) -> float:
    """Distance of a limit from the estimate: the root of first² - 2 phi first second + second²."""
    # Where both distances agree and phi is 1 the sum is zero, and rounding may make it negative.
    return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

"""How much success swings from round to round, over what as many episodes of one policy would.

    python benchmarks/round_swing.py --runs outputs/lift_s0 outputs/lift_s1
    python benchmarks/round_swing.py --runs docs/results/pi0_*/pi0_*_s?.json

Reads the rounds of rollouts between the online updates, of a run's folder or of its record. If one
policy of success p played two rounds of n episodes that follow each other, half their squared
difference would be p (1 - p) / n on average; the swing is the root of its mean over all pairs, over
the root of that of what it would be, p from the two together. 1 is what chance makes; rounds that
get better add to it. The interval is a bootstrap over the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import UserError
from vla_trqam.report.formats import percent, table
from vla_trqam.report.metrics import read_metrics

REPLICATES = 10_000


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run, R of them.

    Attributes:
        run: its folder's name.
        rates: (R,) success.
        episodes: (R,) of each.
    """

    run: str
    rates: NDArray[np.float64]
    episodes: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Reads a run's log, or the JSON file that `collect_results.py` made of it.

        Raises:
            UserError: it has no two rounds.
        """
        step, value = _recorded(folder) if folder.suffix == ".json" else _logged(folder)
        steps = np.unique(step)
        if len(steps) < 2:
            raise UserError(f"{folder} logged no two rounds of rollouts between online updates")
        rounds = [value[step == each] for each in steps]
        rates = np.array([values.mean() for values in rounds])
        return cls(folder.stem, rates, np.array([len(values) for values in rounds]))

    @property
    def seen(self) -> float:
        """Half squared differences of rounds that follow each other, summed."""
        return float((np.diff(self.rates) ** 2).sum() / 2)

    @property
    def by_chance(self) -> float:
        """What they would be by chance, without bias."""
        one, other = self.episodes[:-1], self.episodes[1:]
        both = one + other
        rate = (one * self.rates[:-1] + other * self.rates[1:]) / both
        variance = rate * (1.0 - rate) * both / (both - 1)
        return float((variance * (1.0 / one + 1.0 / other)).sum() / 2)


Episodes = tuple[NDArray[Any], NDArray[np.float64]]
"""(N,) the updates before each episode of the rounds, and whether it succeeded."""


def _logged(folder: Path) -> Episodes:
    series = read_metrics(folder / METRICS_NAME).get("online", {}).get("success")
    return (np.empty(0), np.empty(0)) if series is None else (series.step, series.value)


def _recorded(path: Path) -> Episodes:
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    series = metrics.get("online", {}).get("success", {"step": [], "value": []})
    return np.array(series["step"]), np.array(series["value"])


def swing(rounds: Sequence[Rounds]) -> float:
    """Over chance; NaN where all rounds of all runs went the same way."""
    chance = sum(each.by_chance for each in rounds)
    return float(np.sqrt(sum(each.seen for each in rounds) / chance)) if chance else float("nan")


def interval(rounds: Sequence[Rounds], replicates: int = REPLICATES) -> tuple[float, float] | None:
    """95%, over the runs."""
    if len(rounds) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(rounds), (replicates, len(rounds)))
    seen = np.array([each.seen for each in rounds])[drawn].sum(axis=1)
    chance = np.array([each.by_chance for each in rounds])[drawn].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(np.sqrt(seen / chance), (0.025, 0.975))
    return float(low), float(high)


def tell(rounds: Sequence[Rounds]) -> str:
    """A row a run, and all together."""
    rows = [
        [each.run, ", ".join(percent(rate) for rate in each.rates), f"{swing([each]):.2f}"]
        for each in rounds
    ]
    ends = interval(rounds)
    around = "" if ends is None else f" (95% interval over the runs {ends[0]:.2f} to {ends[1]:.2f})"
    every = f"**All {len(rounds)} runs: {swing(rounds):.2f} times chance**{around}."
    return f"{every}\n\n{table(['run', 'rounds', 'over chance'], rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for what has no rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="folders of runs, or their records"
    )
    try:
        print(tell([Rounds.of(folder) for folder in parser.parse_args(arguments).runs]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

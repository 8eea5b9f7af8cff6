"""The command line that the claims share: runs to a text, a page and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
from claim_runs import ClaimRun, read_claim_runs
from marked import put

from vla_trqam.errors import UserError
from vla_trqam.report.page import write_json


def write_claim[T](
    name: str,
    about: str,
    arguments: Sequence[str] | None,
    take: Callable[[Sequence[ClaimRun]], Sequence[T]],
    tell: Callable[[Sequence[T]], str],
    draw: Callable[[Path, Sequence[T]], Path],
) -> int:
    """Command line of a claim that is read from run folders.

    Args:
        name: of the claim, between whose markers its numbers stand.
        about: a sentence.
        arguments: the command line; None for the program's.
        take: what the runs are to the claim.
        tell: its verdict and table.
        draw: its picture.

    Returns:
        The exit status; 2 for what is no run of the claim's.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs")
    parser.add_argument("--output", type=Path, help="PNG to draw")
    parser.add_argument("--page", type=Path, help="Markdown page to write the numbers into")
    parser.add_argument("--record", type=Path, help="JSON file for each run's command and rates")
    given = parser.parse_args(arguments)
    try:
        runs = read_claim_runs(given.runs)
        taken = take(runs)
        text = tell(taken)
        if given.page is not None:
            put(given.page, name, text)
        if given.record is not None:
            write_json(given.record, {"runs": [run.record for run in runs]})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if given.output is not None:
        print(f"\nwrote {draw(given.output, taken)}")
    return 0

"""The command line that the claims share: what was run to a text, a page and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
from marked import put

from vla_trqam.errors import UserError


@dataclass(frozen=True)
class Source[T]:
    """What a claim is read from.

    Attributes:
        flag: that names its folders.
        about: these folders, for the help.
        read: what the folders are to the claim.
        keep_flag: that says where a reader's copy goes.
        keep_about: this copy, for the help.
        keep: writes the copy of these folders; says what it wrote.
    """

    flag: str
    about: str
    read: Callable[[Sequence[Path]], Sequence[T]]
    keep_flag: str
    keep_about: str
    keep: Callable[[Sequence[Path], Path], str]


def write_claim[T](
    name: str,
    about: str,
    arguments: Sequence[str] | None,
    source: Source[T],
    tell: Callable[[Sequence[T]], str],
    draw: Callable[[Path, Sequence[T]], Path] | None = None,
) -> int:
    """Command line of a claim.

    Args:
        name: of the claim, between whose markers its numbers stand unless others are named.
        about: a sentence.
        arguments: the command line; None for the program's.
        source: what it is read from.
        tell: its verdict and table.
        draw: its picture; None where what it is read from has enough.

    Returns:
        The exit status; 2 for what cannot be read.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        source.flag, type=Path, nargs="+", required=True, dest="folders", help=source.about
    )
    parser.add_argument(source.keep_flag, type=Path, dest="keep", help=source.keep_about)
    parser.add_argument("--page", type=Path, help="Markdown page to write the numbers into")
    parser.add_argument(
        "--marker", default=name, help="between whose markers they stand, where a part has its own"
    )
    if draw is not None:
        parser.add_argument("--output", type=Path, help="PNG to draw")
    given = parser.parse_args(arguments)
    try:
        found = source.read(given.folders)
        text = tell(found)
        if given.page is not None:
            put(given.page, given.marker, text)
        kept = None if given.keep is None else source.keep(given.folders, given.keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if draw is not None and given.output is not None:
        print(f"\nwrote {draw(given.output, found)}")
    if kept is not None:
        print(kept)
    return 0

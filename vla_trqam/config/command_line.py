"""Command lines of the recipes that train nothing: flat flags, and one sentence for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from vla_trqam.errors import UserError


class Flags(argparse.ArgumentParser):
    """Raises a UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """The same sentence as one of ours."""
        raise UserError(f"{message}; --help lists every flag")


def flags_of(doc: str | None) -> Flags:
    """A parser, to be given its flags, with a recipe's docstring as help."""
    style = argparse.RawDescriptionHelpFormatter
    return Flags(description=doc, formatter_class=style, allow_abbrev=False)


def boolean(text: str) -> bool:
    """The value of a flag that is true or false."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def exit_status(work: Callable[[], None], interrupted: str = "") -> int:
    """Does the work; what went wrong becomes one sentence and the status of the program.

    Args:
        work: parses and does all.
        interrupted: said where Ctrl-C ends it.

    Returns:
        0, 2 for a mistake of the user's, 130 when interrupted.
    """
    try:
        work()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130
    return 0

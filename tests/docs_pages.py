"""The code that stands in pages of docs/, to be run as it stands there."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page: str, language: str = "python") -> list[str]:
    """The blocks of a page, in order."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def line_of(code: str, beginning: str) -> str:
    """The one line that begins so, as a `key: value` of the dictionary in which it stands."""
    (line,) = (line.strip() for line in code.splitlines() if line.strip().startswith(beginning))
    return line.rstrip(",")

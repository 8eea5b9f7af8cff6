"""Where a file of the repository stands in the site, and what links to it says there.

GitHub shows the pages of ``docs/`` beside the code, and they link to both. The site has ``docs/``
at its root, and under ``repository/`` every file beyond it that a page links to or the navigation
names: Markdown as it is, source as a page of code. So every link leads to the same text in both,
and none needs to know where the repository is published.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

DOCS = "docs/"
BEYOND = "repository/"
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^ *(```|~~~)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def place_of(file: str) -> str:
    """The site's page of a repository's file, both relative to their roots."""
    if file.startswith(DOCS):
        return file.removeprefix(DOCS)
    return f"{BEYOND}{file}" if file.endswith(".md") else f"{BEYOND}{file}.md"


def file_of(place: str, root: Path) -> str:
    """The repository's file that a page of the site shows."""
    if not place.startswith(BEYOND):
        return DOCS + place
    file = place.removeprefix(BEYOND)
    return file if (root / file).is_file() else file.removesuffix(".md")


def target_of(file: str, link: str, root: Path) -> str | None:
    """The repository's file that a link in `file` leads to; None if it is none of its files."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link))
    return target if not target.startswith("..") and (root / target).is_file() else None


def for_the_site(text: str, file: str, root: Path) -> str:
    """A page's Markdown with its links as the site has them."""
    here = posixpath.dirname(place_of(file))

    def rewritten(match: re.Match[str]) -> str:
        target = target_of(file, match["target"], root)
        if target is None:
            return match[0]
        return posixpath.relpath(place_of(target), here or ".") + (match["anchor"] or "")

    return "".join(
        line if fenced else LINK.sub(rewritten, line) for line, fenced in _lines_of(text)
    )


def linked_beyond(pages: Iterable[str], root: Path) -> list[str]:
    """The files outside ``docs/`` that these pages lead to, directly or through one another."""
    found: set[str] = set()
    left = list(pages)
    while left:
        file = left.pop()
        for target in _targets(file, root):
            if not target.startswith(DOCS) and target not in found:
                found.add(target)
                left.append(target)
    return sorted(found)


def page_of(file: str, root: Path) -> str:
    """The Markdown that the site shows of a file outside ``docs/``."""
    text = (root / file).read_text("utf-8")
    if file.endswith(".md"):
        return text
    language = LANGUAGES.get(PurePosixPath(file).suffix, "text")
    fence = "`" * 8
    header = f"---\nsearch:\n  exclude: true\n---\n\n# `{file}`\n\n"
    return f'{header}{fence}{language} linenums="1"\n{text}\n{fence}\n'


def with_links(text: str, resolve: Callable[[str], str]) -> str:
    """A docstring whose roles, like ``:class:`~vla_trqam.sde.Trajectory```, are cross references.

    Editors know these, Markdown does not. A name that the site has no page for stays a name.

    Args:
        text: the docstring.
        resolve: the full path of a name as it is understood there.
    """

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        shown = name.rpartition(".")[2] if match["short"] else name
        return f'<autoref optional identifier="{resolve(name)}"><code>{shown}</code></autoref>'

    return ROLE.sub(link, text)


def _targets(file: str, root: Path) -> list[str]:
    if not file.endswith(".md"):
        return []
    text = (root / file).read_text("utf-8")
    links = [
        match["target"]
        for line, fenced in _lines_of(text)
        if not fenced
        for match in LINK.finditer(line)
    ]
    return [target for link in links if (target := target_of(file, link, root)) is not None]


def _lines_of(text: str) -> Iterable[tuple[str, bool]]:
    """A page's lines, and whether each belongs to a block of code."""
    fence: str | None = None
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        edge = mark is not None and fence in (None, mark[1])
        yield line, edge or fence is not None
        if edge and mark is not None:
            fence = mark[1] if fence is None else None

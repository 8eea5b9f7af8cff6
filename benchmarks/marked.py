"""Parts of a Markdown page that a command writes: what stands between its two markers."""

from __future__ import annotations

from pathlib import Path

from vla_trqam.errors import UserError


def marked(page: Path, name: str) -> str:
    """What stands between ``<!-- begin name -->`` and ``<!-- end name -->``.

    Raises:
        UserError: the page lacks a marker.
    """
    return _around(page, name)[1].strip()


def put(page: Path, name: str, text: str) -> bool:
    """Writes there; returns whether that changed anything.

    Raises:
        UserError: the page lacks a marker.
    """
    head, old, tail = _around(page, name)
    new = f"\n{text.strip()}\n"
    page.write_text(f"{head}{new}{tail}", encoding="utf-8")
    return new != old


def begin_of(name: str) -> str:
    """The marker that opens a part."""
    return f"<!-- begin {name} -->"


def _around(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = begin_of(name), f"<!-- end {name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, found, rest = text.partition(begin)
    inside, closed, tail = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page} has no {begin} ... {end}, between which this is written")
    return head + begin, inside, end + tail

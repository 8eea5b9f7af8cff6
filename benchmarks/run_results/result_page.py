"""A page of results: `<name>.md`, and beside it `<name>/` with raw numbers and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_results.finished_run import FinishedRun, differing_settings
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.report.formats import jsonable

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        title: its heading.
        headline: the result in a sentence; the index shows it too.
        tables: Markdown tables, each under its heading (empty for none).
        notes: how the numbers were computed.
        summary: the tables' numbers, for `summary.json`.
        draw: writes the figures into a folder; returns them with their captions.
        runs: the runs behind the page.
    """

    title: str
    headline: str
    tables: Mapping[str, str]
    notes: Sequence[str]
    summary: Mapping[str, Any]
    draw: Callable[[Path], dict[Path, str]]
    runs: Sequence[FinishedRun] = field(default_factory=list)


def write_page(page: Page, output: Path, command: str) -> Path:
    """Writes `<output>.md` and `<output>/`, all or nothing, and the index's entry.

    Args:
        page: what to write.
        output: the page's path without `.md`.
        command: the command line that makes the page.

    Raises:
        UserError: `output` ends in .md, or its folder holds something else than such a page.
    """
    _check_output(output)
    with written_whole(output) as part:
        part.mkdir(parents=True)
        figures = page.draw(part)
        for run in page.runs:
            write_compact_json(part / f"{run.name}.json", run.raw())
        write_compact_json(part / SUMMARY, page.summary)
        text = _render(page, output.name, figures, command)
    path = output.with_name(f"{output.name}.md")
    path.write_text(text, encoding="utf-8")
    _update_index(output.parent / "README.md", output.name, page.headline)
    return path


def write_compact_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with a line for every top-level key; NaN and infinities become strings."""
    lines = [f"{json.dumps(key)}: {json.dumps(jsonable(item))}" for key, item in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _check_output(output: Path) -> None:
    if output.suffix == ".md":
        raise UserError(f"--output={output} makes {output} and a folder; leave out the .md")
    ours = (output / SUMMARY).is_file()
    if output.exists() and not ours and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use by something else than a page of results")


def _render(page: Page, name: str, figures: Mapping[Path, str], command: str) -> str:
    parts = [f"# {page.title}", page.headline]
    for heading, content in page.tables.items():
        parts += [f"## {heading}", content] if heading else [content]
    parts += ["\n".join(f"- {note}" for note in page.notes)]
    parts += ["## Figures"] if figures else []
    parts += [f"![{caption}]({name}/{figure.name})" for figure, caption in figures.items()]
    parts += [_how_it_was_made(page.runs, name, command)]
    return "\n\n".join(parts) + "\n"


def _how_it_was_made(runs: Sequence[FinishedRun], name: str, command: str) -> str:
    commands = "\n".join(run.provenance["command"] for run in runs)
    dates = sorted({run.date for run in runs})
    lines = [f"- runs finished: {' to '.join(dict.fromkeys((dates[0], dates[-1])))} (UTC)"]
    for title, key in (("commit", "commit"), ("versions", "versions"), ("machine", "machine")):
        for value in dict.fromkeys(_inline(run.provenance[key]) for run in runs):
            lines.append(f"- {title}: {value}")
    differing = differing_settings(runs)
    listed = "; ".join(f"`{key}` {', '.join(values)}" for key, values in differing.items())
    lines.append(f"- settings that differ, seeds aside: {listed or 'none'}")
    files = ", ".join(f"[{run.name}]({name}/{run.name}.json)" for run in runs)
    lines.append(f"- raw numbers: {files}; [the tables]({name}/{SUMMARY})")
    listing = "\n".join(lines)
    return f"## How it was made\n\n```bash\n{commands}\n{command}\n```\n\n{listing}"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value or "not run from a git checkout")


def _update_index(index: Path, name: str, headline: str) -> None:
    """Puts the headline between the index's markers of this page, where it has them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = index.read_text(encoding="utf-8") if index.is_file() else ""
    if begin not in text or end not in text:
        print(f"{index} has no {begin} ... {end}: it does not show this page")
        return
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    entry = f"{begin}\n{headline} [Page]({name}.md)\n{end}"
    index.write_text(f"{head}{entry}{tail}", encoding="utf-8")

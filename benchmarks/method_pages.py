"""Writes what the code knows of the methods into their pages: who asks what, and every knob.

    python benchmarks/method_pages.py --folder docs/methods

``README.md`` gets one row a method of the registry, from its `Requirements` and what it acts by; a
method's own page its knobs, from the dataclass that owns them, and its success in the recorded
comparison, where the page has a place for them.
"""

from __future__ import annotations

import argparse
import csv
import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from evaluations import SMALL, make
from marked import begin_of, put

from vla_trqam.config.flag_help import as_yaml, attribute_docs
from vla_trqam.methods.base import Requirements
from vla_trqam.methods.bc import BehaviourCloningConfig
from vla_trqam.methods.registry import METHODS
from vla_trqam.report.formats import table
from vla_trqam.study.tables import mean_sd

INDEX, ALL, KNOBS, COMPARED = "README.md", "methods", "knobs", "compared"
RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
STUDIES = "claims_c4", "others"
"""The comparisons there: in each a folder a study, with its table of runs."""
SHARED = ("policy", "critic")
STAGES = ("base", "after_offline", "after_online")
OWNERS: dict[str, type] = {
    **{name: entry.config for name, entry in METHODS.items()},
    "bc": BehaviourCloningConfig,
}
"""The dataclass of a page's knobs; cloning is what the base comes from and no choice."""


def methods_table(folder: Path) -> str:
    """A row a method, and what its columns are."""
    asked = [field.name for field in fields(Requirements)]
    header = ("method", "networks beside policy and critic", "acts by", *map(_code, asked))
    docs = attribute_docs(Requirements)
    legend = "\n".join(f"- {_code(name)}: {_cell(docs[name])}" for name in asked)
    return f"{table(header, [_row(name, folder) for name in METHODS])}\n\n{legend}"


def _code(name: str) -> str:
    return f"`{name}`"


def _row(name: str, folder: Path) -> list[str]:
    asks: Requirements = METHODS[name].requirements
    method = make(METHODS[name].config(), SMALL, 2)
    own = [f"`{key}`" for key in method.modules() if key not in SHARED]
    page = f"[{name}]({name}.md)" if (folder / f"{name}.md").is_file() else name
    return [
        page,
        ", ".join(own) or "none",
        _first_sentence(method.actor()),
        *(_told(getattr(asks, field.name)) for field in fields(Requirements)),
    ]


def _told(value: bool | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_code, value)) or "none"
    return "yes" if value else "no"


def _first_sentence(actor: Any) -> str:
    return inspect.getdoc(type(actor)).split("\n\n")[0].replace("\n", " ").replace("``", "`")  # type: ignore[union-attr]


def knobs_table(config: type) -> str:
    """A row a knob: its name, its default and what it means."""
    docs = attribute_docs(config)
    rows = [
        [f"`{field.name}`", f"`{as_yaml(field.default)}`", docs[field.name].replace("``", "`")]
        for field in fields(config)
    ]
    return table(("knob", "default", "what it is"), [[_cell(c) for c in row] for row in rows])


def success_table(method: str) -> str:
    """A row a task of the comparison, means over its seeds."""
    rows = []
    for path in [p for name in STUDIES for p in sorted((RESULTS / name).glob("*/table.csv"))]:
        with path.open(newline="", encoding="utf-8") as file:
            runs = [row for row in csv.DictReader(file) if row["method"] == method]
        for task in dict.fromkeys(run["task"] for run in runs):
            own = [run for run in runs if run["task"] == task]
            rates = [mean_sd([float(run[column]) for run in own]) for column in STAGES]
            page = f"[{task}](../results/{path.parent.relative_to(RESULTS)}/table.md)"
            rows.append([page, str(len(own)), *rates])
    return table(("task", "seeds", "base", "after offline", "after online"), rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def write(folder: Path) -> list[Path]:
    """Writes into every page that there is; returns those that changed."""
    parts = [(folder / INDEX, ALL, methods_table(folder))]
    for name, config in OWNERS.items():
        page = folder / f"{name}.md"
        there = page.read_text(encoding="utf-8") if page.is_file() else ""
        if begin_of(KNOBS) in there:
            parts.append((page, KNOBS, knobs_table(config)))
        if begin_of(COMPARED) in there:
            parts.append((page, COMPARED, success_table(name)))
    return list(dict.fromkeys(page for page, name, text in parts if put(page, name, text)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes, and says which pages changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("docs/methods"), help="of the pages")
    for page in write(parser.parse_args(arguments).folder):
        print(f"wrote {page}")


if __name__ == "__main__":
    main()

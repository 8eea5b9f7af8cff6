"""The house in one picture: its rooms, and which imports which.

    python benchmarks/architecture.py
    python benchmarks/architecture.py --output docs/figures/architecture.svg

Rooms and imports are read from the sources. Every room stands to the right of and below those that
may import it: an import is a dot where the line out of the one meets the arrow into the other, the
larger the more there are. An import against the allowed direction is an error. Printed are the
numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from house import (
    MATHEMATICS,
    RANKS,
    ROOT,
    all_upward_imports,
    imports_between_rooms,
    room_of,
    source_trees,
)

from vla_trqam.errors import UserError

BLUE, GREEN, GREY, ORANGE, PURPLE = "#0b6aa8", "#0b7f5c", "#6f7378", "#b4530f", "#7a4fa3"
ROOMS = {
    "recipes": (PURPLE, "what is run: presets, and one call of the engine"),
    "study": (PURPLE, "many runs side by side, and their table"),
    "jobs": (ORANGE, "states, VLA: what a kind of run brings"),
    "hub": (GREY, "push a run to the Hub, pull one"),
    "engine": (ORANGE, "phases, checkpoints, interruption, processes"),
    "preflight": (GREY, "what cannot work, before the first step"),
    "config": (GREY, "settings, presets, --help"),
    "report": (GREY, "metrics, intervals, figures, the page"),
    "methods": (GREEN, "TRQAM, QAM, FQL, IFQL, DSRL, cloning"),
    "adapters": (GREEN, "policies: MLP, π0, π0.5, SmolVLA"),
    "envs": (GREEN, "simulators, and rollouts in processes"),
    "data": (GREEN, "episodes, replay, sampling, sources"),
    MATHEMATICS: (BLUE, "chain, adjoint, losses, KL, critic, contract"),
    "kernels": (BLUE, "the same numbers by hand, faster"),
}
"""Colour and purpose of each, from those that import to those that are imported."""

Imports = Mapping[tuple[str, str], int]

MARGIN, PITCH, FALL = 6, 54, 52
WIDTH, HEIGHT, TIP = 300, 40, 8
ENTRY = 22
"""From a box's right edge to where lines come in from above, beyond the boxes before it."""

LEGEND = (
    "A dot: the room on its line imports",
    "the room that its arrow points to;",
    "the larger, the more imports.",
)


@dataclass(frozen=True)
class Box:
    """A room in the picture.

    Attributes:
        name: the room.
        x: left edge.
        y: upper edge.
    """

    name: str
    x: int
    y: int

    @property
    def color(self) -> str:
        """Of the box and of what it imports."""
        return ROOMS[self.name][0]

    @property
    def middle(self) -> int:
        """Height at which its own imports leave it."""
        return self.y + HEIGHT // 2

    @property
    def entry(self) -> int:
        """Where lines come in from above."""
        return self.x + WIDTH - ENTRY


def imports_of_today() -> Counter[tuple[str, str]]:
    """What the sources say.

    Raises:
        UserError: an import flows against the allowed direction, or a room is not in the picture.
    """
    trees = source_trees()
    against = all_upward_imports(trees)
    if against:
        named = "; ".join(f"{module} imports {target}" for module, target in against)
        raise UserError(f"imports flow one way (benchmarks/house.py), but {named}")
    unknown = {room for name in trees if (room := room_of(name)) is not None} - set(ROOMS)
    if unknown:
        raise UserError(f"benchmarks/architecture.py knows no room {', '.join(sorted(unknown))}")
    return imports_between_rooms(trees)


def boxes(imports: Imports) -> list[Box]:
    """The rooms that there are, on a staircase."""
    there = {room for pair in imports for room in pair}
    names = sorted((name for name in ROOMS if name in there), key=_height)
    return [Box(name, MARGIN + i * PITCH, MARGIN + i * FALL) for i, name in enumerate(names)]


def drawn(imports: Imports) -> str:
    """The picture, an SVG; what it shows can be read from it by `imports_in`."""
    rooms = boxes(imports)
    width = rooms[-1].x + WIDTH + MARGIN
    height = rooms[-1].y + HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif">',
        "<title>The rooms of vla_trqam and their imports</title>",
        *_tracks(rooms, imports),
        *_tracks_back(rooms, imports),
        *_dots(rooms, imports),
        *(line for box in rooms for line in _drawn_box(box)),
        *_legend(height),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def imports_in(picture: str) -> set[tuple[str, str]]:
    """Which room imports which, in a picture of `drawn`."""
    marked = (line for line in picture.splitlines() if line.startswith("<circle data-imports="))
    pairs = (line.split('"')[1].partition(" ") for line in marked)
    return {(importing, imported) for importing, _, imported in pairs}


def _height(room: str) -> tuple[int, int]:
    """Rooms that import come first; among peers the order of `ROOMS` decides."""
    rank = RANKS["critic"] if room == MATHEMATICS else RANKS[room]
    return -rank, list(ROOMS).index(room)


def _tracks(rooms: Sequence[Box], imports: Imports) -> Iterator[str]:
    """A line out of every room that imports, and an arrow into every room that is imported."""
    for box in rooms:
        right = [room.entry for room in rooms if (box.name, room.name) in imports]
        above = [room.middle for room in rooms if (room.name, box.name) in imports]
        if reach := [x for x in right if x > box.x + WIDTH]:
            yield _stroke(box, f"M{box.x + WIDTH} {box.middle} H{max(reach)}")
        if reach := [y for y in above if y < box.y]:
            yield _stroke(box, f"M{box.entry} {min(reach)} V{box.y - TIP}")
            yield _arrow(box, box.entry, box.y - TIP, box.y)


def _tracks_back(rooms: Sequence[Box], imports: Imports) -> Iterator[str]:
    """The same among peers that import each other, on the other side of the stairs."""
    for box in rooms:
        below = [room for room in rooms if (room.name, box.name) in imports and room.y > box.y]
        bottom, x = box.y + HEIGHT, box.x + ENTRY
        for room in below:
            yield _stroke(room, f"M{room.x} {room.middle} H{x}")
            yield _stroke(box, f"M{x} {room.middle} V{bottom + TIP}")
        if below:
            yield _arrow(box, x, bottom + TIP, bottom)


def _dots(rooms: Sequence[Box], imports: Imports) -> Iterator[str]:
    """One for every pair of rooms, where the line of the one meets the arrow of the other."""
    for row in rooms:
        for column in rooms:
            if number := imports.get((row.name, column.name), 0):
                x = column.entry if column.y > row.y else column.x + ENTRY
                radius = 1.0 + 1.6 * math.sqrt(number)
                yield (
                    f'<circle data-imports="{row.name} {column.name}" cx="{x}" cy="{row.middle}" '
                    f'r="{radius:.1f}" fill="{row.color}"/>'
                )


def _stroke(box: Box, path: str) -> str:
    return f'<path d="{path}" stroke="{box.color}" stroke-width="1.6" fill="none"/>'


def _arrow(box: Box, x: int, base: int, tip: int) -> str:
    return f'<path d="M{x - 5} {base} H{x + 5} L{x} {tip} Z" fill="{box.color}"/>'


def _legend(height: int) -> Iterator[str]:
    for i, text in enumerate(LEGEND):
        y = height - 16 - 17 * (len(LEGEND) - 1 - i)
        yield f'<text x="{MARGIN}" y="{y}" font-size="12" fill="#80868e">{escape(text)}</text>'


def _drawn_box(box: Box) -> Iterator[str]:
    left = box.x + 12
    yield (
        f'<rect x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
        f'fill="{box.color}"/>'
    )
    yield (
        f'<text x="{left}" y="{box.y + 17}" font-size="14" font-weight="600" fill="#ffffff">'
        f"{escape(box.name)}</text>"
    )
    yield (
        f'<text x="{left}" y="{box.y + 32}" font-size="11" fill="#ffffff">'
        f"{escape(ROOMS[box.name][1])}</text>"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the numbers; draws where a path is given; 2 for an import that must not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="SVG to draw")
    given = parser.parse_args(arguments)
    try:
        imports = imports_of_today()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for (importing, imported), number in sorted(imports.items()):
        print(f"{importing:12} imports {imported:12} {number:4}")
    if given.output is not None:
        given.output.write_text(drawn(imports), "utf-8")
        print(f"wrote {given.output}")
    return 0


PICTURE = ROOT / "docs" / "figures" / "architecture.svg"

if __name__ == "__main__":
    sys.exit(main())

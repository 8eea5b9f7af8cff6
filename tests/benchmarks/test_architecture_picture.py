"""The picture of the house shows what the sources say, and no import that must not be."""

import ast
import itertools
import re

import architecture
import pytest
from architecture import PICTURE, boxes, drawn, imports_in, imports_of_today
from house import imports_between_rooms, source_trees

from vla_trqam.errors import UserError


def trees(**code: str) -> dict[str, ast.Module]:
    return {f"vla_trqam.{name.replace('__', '.')}": ast.parse(text) for name, text in code.items()}


def test_the_committed_picture_has_the_imports_of_today() -> None:
    today = set(imports_between_rooms(source_trees()))
    assert imports_in(PICTURE.read_text("utf-8")) == today, (
        "run: python benchmarks/architecture.py --output docs/figures/architecture.svg"
    )


def test_modules_that_import_are_counted_by_room() -> None:
    found = imports_between_rooms(
        trees(
            sde="from vla_trqam.time_grid import Step, TimeGrid",
            time_grid="from vla_trqam.errors import UserError",
            methods__bc="from vla_trqam.sde import a\nfrom vla_trqam.sde import b",
            methods__fql="import vla_trqam.sde\ndef f():\n    from vla_trqam import time_grid",
            errors="",
        )
    )
    assert found == {("methods", "mathematics"): 3}


def test_an_import_against_the_stream_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = trees(data__replay="from vla_trqam.engine.run import Run", engine__run="")
    monkeypatch.setattr(architecture, "source_trees", lambda: wrong)
    with pytest.raises(UserError, match=r"data\.replay imports vla_trqam\.engine\.run\.Run"):
        imports_of_today()
    assert architecture.main([]) == 2


def test_a_room_that_the_picture_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "source_trees", lambda: trees(cellar__wine=""))
    with pytest.raises(UserError, match="knows no room cellar"):
        imports_of_today()


def test_every_import_is_a_dot_where_its_rooms_meet() -> None:
    imports = {("recipes", "engine"): 9, ("engine", "data"): 4, ("data", "envs"): 1}
    picture = drawn(imports)
    assert imports_in(picture) == set(imports)
    at = {box.name: box for box in boxes(imports)}
    assert list(at) == ["recipes", "engine", "envs", "data"]
    dots = re.findall(r'imports="(\w+) (\w+)" cx="(\d+)" cy="(\d+)" r="([\d.]+)"', picture)
    for row, column, _, y, _ in dots:
        assert int(y) == at[row].middle, (row, column)
    xs = {(row, column): int(x) for row, column, x, _, _ in dots}
    assert xs["recipes", "engine"] == at["engine"].entry
    assert at["envs"].x < xs["data", "envs"] < at["data"].x
    sizes = {(row, column): float(radius) for row, column, *_, radius in dots}
    assert sorted(sizes, key=lambda pair: imports[pair]) == sorted(sizes, key=lambda p: sizes[p])


def test_lines_into_a_box_pass_the_boxes_before_it() -> None:
    stairs = boxes(dict.fromkeys([("recipes", "engine"), ("engine", "data"), ("data", "envs")], 1))
    for before, after in itertools.pairwise(stairs):
        assert after.entry > before.x + architecture.WIDTH

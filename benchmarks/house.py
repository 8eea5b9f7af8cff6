"""The house as its sources say it: the rooms, and which way imports may flow.

Read from the syntax trees, so that an import inside a function counts too. The tests enforce it
(`tests/test_architecture.py`), the architecture's picture shows it (`benchmarks/architecture.py`).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A module may import only from lower ranks and its own package; packages (rank 4 and up) also from
# their own rank.
MATH_RANKS = {
    "errors": -1,
    "precision": -1,
    "kernel_choice": 0,
    "kernels": 0,
    "time_grid": 0,
    "losses": 1,
    "networks": 1,
    "policy": 1,
    "trust_region": 1,
    "sde": 2,
    "adjoint": 3,
    "critic": 3,
}
PACKAGE_RANKS = {
    **dict.fromkeys(("adapters", "data", "envs", "methods"), 4),
    "report": 5,
    "config": 6,
    "preflight": 7,
    "engine": 8,
    "hub": 9,
    "jobs": 10,
    "study": 11,
    "recipes": 12,
}
# `files` and `launched` are no packages, and no math either: one writes, one reads the environment.
RANKS = MATH_RANKS | {"files": 4, "launched": 4} | PACKAGE_RANKS
MATHEMATICS = "mathematics"
MATH_ROOMS = ("kernels",)
"""Folders among the mathematics that are rooms of their own."""
IN_NO_ROOM = ("", "errors", "files", "launched")


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    folders = {
        "vla_trqam": ROOT / "vla_trqam",
        "vla_trqam.adapters": ROOT / "adapters",
        "vla_trqam.recipes": ROOT / "recipes",
    }
    files: dict[str, Path] = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            files[name] = path
    return files


def source_trees() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package by its dotted name."""
    return {name: ast.parse(path.read_text("utf-8")) for name, path in source_files().items()}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names that `tree` imports, wherever in the file the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank_of(module: str) -> int | None:
    """Rank of a module of ours; None for the package itself and for others' modules.

    A module of ours without a rank has a test of its own.
    """
    package, _, rest = module.partition(".")
    if package != "vla_trqam" or not rest:
        return None
    return RANKS.get(rest.split(".")[0])


def upward_imports(module: str, tree: ast.AST) -> list[str]:
    """Imports of `module` that do not flow from a lower rank to a higher one."""
    own = rank_of(module)
    wrong = []
    for target in imports_of(tree):
        rank = rank_of(target)
        if own is None or rank is None:
            continue
        among_math = own < min(PACKAGE_RANKS.values())
        same_package = target.split(".")[1] == module.split(".")[1]
        if rank > own or (rank == own and among_math and not same_package):
            wrong.append(target)
    return wrong


def own_module(target: str, modules: Collection[str]) -> str | None:
    """The module of ours that `import target` loads: `target` is a module or a name in one."""
    for name in (target, target.rpartition(".")[0]):
        if name in modules:
            return name
    return None


def room_of(module: str) -> str | None:
    """The room that a module stands in; None for what stands in none.

    The files of the mathematics are one room. `errors`, `files` and `launched` are small, and
    imported from everywhere; the package itself is empty.
    """
    name = module.partition(".")[2].split(".")[0]
    if name in IN_NO_ROOM:
        return None
    return MATHEMATICS if name in MATH_RANKS and name not in MATH_ROOMS else name


def imports_between_rooms(trees: Mapping[str, ast.AST]) -> Counter[tuple[str, str]]:
    """(importing room, imported room) -> how many pairs of a module and one that it imports."""
    found: Counter[tuple[str, str]] = Counter()
    for module, tree in trees.items():
        targets = {own_module(target, trees) for target in imports_of(tree)}
        rooms = [(room_of(module), room_of(target)) for target in targets if target is not None]
        found.update((a, b) for a, b in rooms if a is not None and b is not None and a != b)
    return found


def all_upward_imports(trees: Mapping[str, ast.AST]) -> list[tuple[str, str]]:
    """Every import that does not flow as it may: (module, what it imports)."""
    return [(name, target) for name, tree in trees.items() for target in upward_imports(name, tree)]

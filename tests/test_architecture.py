"""The shape of the project: which way imports flow, what math may do, and what is never unpickled.

Everything is read from the source's syntax tree, so that an import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import only from lower ranks; packages (rank 3 and up) also from their own rank.
MATH_RANKS = {
    "errors": -1,
    "gelu": 0,
    "precision": 0,
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
    "recipes": 11,
}
# `files` and `launched` are no packages, and no math either: one writes, one reads the environment.
RANKS = MATH_RANKS | {"files": 4, "launched": 4} | PACKAGE_RANKS

# What would make a math file read, write or talk. Importing pathlib is the contract's privilege:
# `policy.py` names the type of a checkpoint's folder.
IO_MODULES = {
    *("io", "json", "logging", "os", "pathlib", "pickle", "random", "shutil", "socket", "sqlite3"),
    *("subprocess", "sys", "tempfile", "urllib", "warnings"),
}
IO_CALLS = {"open", "print", "input", "Path", "read_text", "write_text", "save_file", "load_file"}
HEAVY = ("lerobot", "transformers", "robosuite", "robomimic", "mujoco", "h5py", "matplotlib")
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    folders = {
        "vla_trqam": ROOT / "vla_trqam",
        "vla_trqam.adapters": ROOT / "adapters",
        "vla_trqam.recipes": ROOT / "recipes",
    }
    files = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            files[name] = path
    return files


FILES = source_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MATH_FILES = sorted(f"vla_trqam.{name}" for name in MATH_RANKS)


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
        if rank > own or (rank == own and own < min(PACKAGE_RANKS.values())):
            wrong.append(target)
    return wrong


def own_module(target: str) -> str | None:
    """The module of ours that `import target` loads: `target` is a module or a name in one."""
    for name in (target, target.rpartition(".")[0]):
        if name in TREES:
            return name
    return None


def calls_of(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls with their function's dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def io_in(module: str, tree: ast.AST) -> list[str]:
    """What in a math file would read, write or talk."""
    allowed = {"pathlib"} if module == "vla_trqam.policy" else set()
    imported = [name for name in imports_of(tree) if name.split(".")[0] in IO_MODULES - allowed]
    called = [name for name, _ in calls_of(tree) if name.split(".")[-1] in IO_CALLS]
    return imported + called


def unpickling_in(tree: ast.AST) -> list[str]:
    """What in a file would pickle or unpickle."""
    found = [name for name in imports_of(tree) if name.split(".")[0] in PICKLERS]
    for name, call in calls_of(tree):
        if name in {"torch.load", "torch.save"}:
            found.append(name)
        for keyword in call.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                found.append(f"{name}(allow_pickle={ast.unparse(keyword.value)})")
    return found


def test_every_module_has_a_rank():
    unknown = [name for name in FILES if "." in name and name.split(".")[1] not in RANKS]
    assert not unknown, f"give these a rank in {Path(__file__).name}: {unknown}"


def test_every_math_file_exists():
    assert set(MATH_FILES) <= FILES.keys()


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_flow_one_way(module):
    assert upward_imports(module, TREES[module]) == []


@pytest.mark.parametrize("name", ["base", "chunked", "pool_worker", "rollout", "worker"])
def test_the_pool_knows_no_simulator(name):
    known = {"base", "chunked", "pool_worker", "rollout", "seeding", "worker"}
    targets = imports_of(TREES[f"vla_trqam.envs.{name}"])
    envs = {target.split(".")[2] for target in targets if target.startswith("vla_trqam.envs.")}
    assert envs <= known


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {
        name: {own for target in module_level_imports(tree) if (own := own_module(target))} - {name}
        for name, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def module_level_imports(tree: ast.Module) -> Iterator[str]:
    """Imports carried out when the module loads: not in functions, not for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports_of(node)


@pytest.mark.parametrize("module", MATH_FILES)
def test_math_imports_only_torch_the_standard_library_and_math(module):
    allowed = {"torch", "vla_trqam", *sys.stdlib_module_names}
    assert [n for n in imports_of(TREES[module]) if n.split(".")[0] not in allowed] == []


@pytest.mark.parametrize("module", MATH_FILES)
def test_math_does_no_io(module):
    assert io_in(module, TREES[module]) == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_unpickled(module):
    assert unpickling_in(TREES[module]) == []


def test_importing_the_library_imports_no_host_library():
    light = ["vla_trqam"] + [f"vla_trqam.{name}" for name in sorted(PACKAGE_RANKS)]
    code = f"import sys, {', '.join(light)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "vla_trqam" in loaded
    assert loaded.isdisjoint(HEAVY), f"imported: {sorted(loaded & set(HEAVY))}"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("vla_trqam.sde", "from vla_trqam.adjoint import lean_adjoint"),
        ("vla_trqam.sde", "from vla_trqam import adjoint"),
        ("vla_trqam.losses", "def f():\n    import vla_trqam.methods.trqam"),
        ("vla_trqam.data.replay", "from vla_trqam.report.metrics import MetricsLog"),
        ("vla_trqam.engine.trainer", "from vla_trqam.recipes import compare"),
    ],
)
def test_an_upward_import_is_caught(module, code):
    assert upward_imports(module, ast.parse(code)) != []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("vla_trqam.adjoint", "from vla_trqam.sde import Trajectory"),
        ("vla_trqam.methods.trqam", "from vla_trqam.data.transitions import TransitionBatch"),
        ("vla_trqam.recipes.compare", "from vla_trqam.report import plots"),
    ],
)
def test_a_downward_import_is_fine(module, code):
    assert upward_imports(module, ast.parse(code)) == []


@pytest.mark.parametrize(
    "code",
    ["print(1)", "import json", "from pathlib import Path", "f = open('x')", "p.write_text('x')"],
)
def test_io_is_caught(code):
    assert io_in("vla_trqam.sde", ast.parse(code)) != []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "torch.load(p)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "def f():\n    from joblib import load",
    ],
)
def test_unpickling_is_caught(code):
    assert unpickling_in(ast.parse(code)) != []

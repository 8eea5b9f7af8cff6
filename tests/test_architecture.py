"""The shape of the project: which way imports flow, what math may do, and what is never unpickled.

Everything is read from the source's syntax tree, so that an import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from house import (
    MATH_RANKS,
    PACKAGE_RANKS,
    RANKS,
    imports_of,
    own_module,
    source_trees,
    upward_imports,
)

# What would make a math file read, write or talk. Importing pathlib is the contract's privilege:
# `policy.py` names the type of a checkpoint's folder.
IO_MODULES = {
    *("io", "json", "logging", "os", "pathlib", "pickle", "random", "shutil", "socket", "sqlite3"),
    *("subprocess", "sys", "tempfile", "urllib", "warnings"),
}
IO_CALLS = {"open", "print", "input", "Path", "read_text", "write_text", "save_file", "load_file"}
HEAVY = ("lerobot", "transformers", "robosuite", "robomimic", "mujoco", "h5py", "matplotlib")
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


TREES = source_trees()
MATH_FILES = sorted(name for name in TREES if name.partition(".")[2].split(".")[0] in MATH_RANKS)
KERNELS = "vla_trqam.kernels"


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
    unknown = [name for name in TREES if "." in name and name.split(".")[1] not in RANKS]
    assert not unknown, f"give these a rank in benchmarks/house.py: {unknown}"


def test_every_math_file_exists():
    assert {f"vla_trqam.{name}" for name in MATH_RANKS} <= TREES.keys()


@pytest.mark.parametrize("module", sorted(TREES))
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
        name: {own_module(target, TREES) for target in module_level_imports(tree)} - {name, None}
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


@pytest.mark.parametrize("module", [name for name in TREES if name.startswith(KERNELS)])
def test_a_kernel_knows_torch_and_no_model(module):
    own = [name for name in imports_of(TREES[module]) if name.startswith("vla_trqam.")]
    assert [name for name in own if not name.startswith((KERNELS, "vla_trqam.precision"))] == []


@pytest.mark.parametrize("module", [name for name in TREES if not name.startswith(KERNELS)])
def test_a_kernel_is_imported_only_where_it_is_called(module):
    assert [n for n in module_level_imports(TREES[module]) if n.startswith(KERNELS)] == []


def test_without_the_folder_of_kernels_an_update_differs_by_rounding():
    code = UPDATE.replace("NAME", KERNELS)
    found = {}
    for hidden in ("True", "False"):
        program = code.replace("HIDDEN", hidden)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        chosen, loaded, *numbers = done.stdout.split()
        assert (chosen, loaded) == (("plain", "False") if hidden == "True" else ("fast", "True"))
        found[hidden] = [float(number) for number in numbers]
    assert found["True"] == pytest.approx(found["False"], rel=1e-4)


UPDATE = """
import sys
if HIDDEN:
    sys.modules["NAME"] = None  # as if the folder were not there
import torch
from vla_trqam import kernel_choice
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig
torch.manual_seed(0)
policy = MLPFlowPolicy(MLPFlowConfig(4, 2, 3, (16, 16), True, 5))
method = TRQAM(policy, Critic(CriticEnsemble(4, 6, (16,), 3)), TRQAMConfig())
some, ones = torch.zeros(8, dtype=torch.bool), torch.ones(8)
batch = TransitionBatch(
    torch.randn(8, 4), torch.rand(8, 3, 2), torch.randn(8), torch.randn(8, 4), 0.9 * ones, some,
    some, torch.ones(8, 3, dtype=torch.bool),
)
for seed in range(2):
    method.update(batch, torch.Generator().manual_seed(seed))
logged = method.metrics()
names = ("adjoint_loss", "td_loss", "kl_estimate", "actor_grad_norm", "critic_grad_norm")
loaded = sys.modules.get("NAME.mlp_path") is not None
print(kernel_choice.DEFAULT_KERNELS, loaded, *(logged[n] for n in names))
"""


@pytest.mark.parametrize("module", MATH_FILES)
def test_math_does_no_io(module):
    assert io_in(module, TREES[module]) == []


@pytest.mark.parametrize("module", sorted(TREES))
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

"""docs/add_a_task.md: its file as a module, here and in simulator processes, and its registry."""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from docs_pages import code_of, line_of

from vla_trqam.envs import registry

FILE, ENTRY, TESTS, DATA = code_of("add_a_task.md")
NAME = "mountain_car"
FOLDER = TemporaryDirectory(prefix="page_")


def read_file() -> types.ModuleType:
    """The page's file, imported from where a simulator process finds it too."""
    (Path(FOLDER.name) / f"{NAME}.py").write_text(FILE, "utf-8")
    sys.path.append(FOLDER.name)
    module = importlib.import_module(NAME)
    sys.modules[f"vla_trqam.envs.{NAME}"] = module
    return module


CAR = read_file()


@contextmanager
def registered() -> Iterator[None]:
    """While `--env.type` and simulator processes know it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", FOLDER.name)
        patch.setitem(registry.BUILDERS, *_entry())
        yield


def _entry() -> tuple[str, tuple[registry.Build, tuple[str, ...]]]:
    """What the page adds to the registry, name and value."""
    scope = {**vars(registry), **vars(CAR)}
    exec(ENTRY[: ENTRY.index("BUILDERS")], scope)
    ((name, value),) = eval("{" + line_of(ENTRY, f'"{NAME}"') + "}", scope).items()
    return name, value

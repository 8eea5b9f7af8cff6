"""Type checks of everything, across the border of ``adapters/`` and ``recipes/`` too.

    uv run python benchmarks/check_types.py

The two folders stand at the root and are installed as ``vla_trqam.adapters`` and
``vla_trqam.recipes``, which mypy cannot be told. So it checks a tree of links in ``build/types``,
in which they lie where they are imported from; its messages name the real files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "types"
CACHE = ROOT / "build" / "types_cache"
INSTALLED = ("adapters", "recipes")
BENCHMARKS = ROOT / "benchmarks"
CLAIMS = BENCHMARKS / "claims"
SCRIPTS = {
    path.name: path
    for path in sorted([*BENCHMARKS.iterdir(), *CLAIMS.iterdir()])
    if path.suffix == ".py" or (path / "__init__.py").is_file()
}
"""What scripts import by its name alone: each other, and folders of modules."""


def lay_out() -> list[str]:
    """Makes the tree anew; returns what is to be checked in it."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "vla_trqam"
    package.mkdir(parents=True)
    parts = [path for path in (ROOT / "vla_trqam").iterdir() if path.name != "__pycache__"]
    for path in [*parts, *(ROOT / name for name in INSTALLED)]:
        (package / path.name).symlink_to(path)
    for path in SCRIPTS.values():
        (TREE / path.name).symlink_to(path)
    return ["vla_trqam", *SCRIPTS]


def main() -> int:
    """Checks; the exit status is mypy's."""
    checked = lay_out()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, f"--cache-dir={CACHE}", *checked], cwd=TREE, capture_output=True, text=True
    )
    sys.stderr.write(done.stderr)
    for line in done.stdout.splitlines():
        print(_real(line))
    return done.returncode


def _real(line: str) -> str:
    """A message with the path in the repository."""
    for name in INSTALLED:
        if line.startswith(f"vla_trqam/{name}/"):
            return line.removeprefix("vla_trqam/")
    known = SCRIPTS.get(re.split("[/:]", line, maxsplit=1)[0])
    return line if known is None else f"{known.relative_to(ROOT)}{line.removeprefix(known.name)}"


if __name__ == "__main__":
    sys.exit(main())

"""The small problems of the core's tests, and the toy task of the engine's and the recipes'."""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("core", "engine", "recipes"))

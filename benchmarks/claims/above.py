"""Puts ``benchmarks/`` where the claims' scripts import from: `import above`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

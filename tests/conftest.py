"""Settings of the whole test run."""

import os
import sys
from pathlib import Path

# The tests run in as many processes as there are cores: one thread each, their children too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Scripts that tests import; they are not part of the package.
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "claims")]

"""Settings of the whole test run."""

import os
import sys
from pathlib import Path

import pytest

# The tests run in as many processes as there are cores: one thread each, their children too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Scripts that tests import; they are not part of the package.
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "claims")]


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps of a study that take no seconds each."""
    monkeypatch.setattr("vla_trqam.study.statistics.REPLICATES", 200)

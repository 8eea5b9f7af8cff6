"""Settings of the whole test run."""

import os

# The tests run in as many processes as there are cores: one thread each, their children too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

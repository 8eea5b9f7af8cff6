"""Simulators that draw from the process-wide generators, made functions of a seed."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the process-wide generators for a block, then put them back.

    robosuite 1.5.1 draws object sizes, placements and the arm's initial noise from `np.random`
    and the object of the single-object tasks from `random`; its own `env.rng` is never used.
    OGBench's mazes draw the start from `np.random`.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)

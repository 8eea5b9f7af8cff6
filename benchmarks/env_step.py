"""Times a control step of the simulated tasks: ours against robosuite's own.

    python benchmarks/env_step.py

For each task it prints control steps per second of CPU time and the milliseconds of a reset (the
median), with `RobomimicEnv` and with the environment that robomimic itself makes, and whether the
two gave the same observations, number by number. Both play the same actions from the same seeds, in
turns, in this one process. Exits with 1 where an observation differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import numpy as np

from vla_trqam.envs.robomimic.demonstrators.tasks import DEMO_TASKS, demo_task
from vla_trqam.envs.robomimic.env import RobomimicEnv, create_robomimic_env
from vla_trqam.envs.robomimic.env_meta import LOW_DIM_KEYS, Task, env_meta_for
from vla_trqam.errors import UserError

EPISODE_STEPS = 100
ACTION_DIM = 7
# Of a move's memory from one control step to the next, and of what is new in it.
MEMORY, NOVELTY = 0.9, 0.3


class Stepper(Protocol):
    """What is timed."""

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode; the observation, (O,) float32."""

    def step(self, action: np.ndarray) -> np.ndarray:
        """One control step with an action (7,) in [-1, 1]; the observation, (O,) float32."""

    def close(self) -> None:
        """Releases the simulator."""


class Ours:
    """`RobomimicEnv` with its fast step."""

    def __init__(self, task: Task) -> None:
        meta = env_meta_for(task)
        self._env = RobomimicEnv(meta, max_episode_steps=EPISODE_STEPS, fast_step=True)

    def reset(self, seed: int) -> np.ndarray:
        """See `Stepper`."""
        return self._env.reset(seed=seed)[0]

    def step(self, action: np.ndarray) -> np.ndarray:
        """See `Stepper`."""
        return self._env.step(action)[0]

    def close(self) -> None:
        """See `Stepper`."""
        self._env.close()


class Stock:
    """robosuite's environment as robomimic makes and steps it; a reset rebuilds the model."""

    def __init__(self, task: Task) -> None:
        self._env = create_robomimic_env(env_meta_for(task))

    def reset(self, seed: int) -> np.ndarray:
        """See `Stepper`."""
        # robosuite draws initial states from the process-wide generators.
        np.random.seed(seed)
        random.seed(seed)
        self._env.reset()
        # The relative poses in a reset's own observation are stale.
        return _vector(self._env.get_observation())

    def step(self, action: np.ndarray) -> np.ndarray:
        """See `Stepper`."""
        return _vector(self._env.step(action)[0])

    def close(self) -> None:
        """See `Stepper`."""
        self._env.env.close()


@dataclass
class Spent:
    """CPU time of one environment.

    Attributes:
        steps: control steps done.
        step_seconds: seconds they took.
        reset_seconds: seconds of every reset.
    """

    steps: int = 0
    step_seconds: float = 0.0
    reset_seconds: list[float] = field(default_factory=list)

    def play(self, env: Stepper, seed: int, actions: np.ndarray) -> np.ndarray:
        """One episode; its observations, (steps + 1, O)."""
        start = time.process_time()
        observations = [env.reset(seed)]
        begun = time.process_time()
        observations += [env.step(action) for action in actions]
        self.step_seconds += time.process_time() - begun
        self.reset_seconds.append(begun - start)
        self.steps += len(actions)
        return np.stack(observations)

    @property
    def steps_per_second(self) -> float:
        """Control steps per second of CPU time."""
        return self.steps / self.step_seconds

    @property
    def reset_ms(self) -> float:
        """Milliseconds of a reset, the median."""
        return 1000 * median(self.reset_seconds)


def smooth_actions(count: int, seed: int) -> np.ndarray:
    """(count, 7): arm moves that change slowly; the gripper opens and closes now and then."""
    generator = np.random.default_rng(seed)
    moves = NOVELTY * generator.normal(size=(count, ACTION_DIM))
    for k in range(1, count):
        moves[k] += MEMORY * moves[k - 1]
    moves[:, -1] = np.sign(moves[:, -1])
    return np.clip(moves, -1.0, 1.0)


def compare(ours: Stepper, stock: Stepper, steps: int) -> tuple[Spent, Spent, str | None]:
    """Plays so many control steps with each; where they differ first, None for nowhere."""
    spent, difference = (Spent(), Spent()), None
    # What a first step compiles and loads does not count.
    for env in (ours, stock):
        Spent().play(env, 0, smooth_actions(2, 0))
    for seed, done in enumerate(range(0, steps, EPISODE_STEPS)):
        actions = smooth_actions(min(EPISODE_STEPS, steps - done), seed)
        found, expected = (
            clock.play(env, seed, actions) for clock, env in zip(spent, (ours, stock), strict=True)
        )
        difference = difference or _first_difference(found, expected, seed)
    return *spent, difference


def _first_difference(found: np.ndarray, expected: np.ndarray, seed: int) -> str | None:
    wrong = (found != expected).any(axis=1)
    if not wrong.any():
        return None
    step = int(wrong.argmax())
    largest = float(np.abs(found[step] - expected[step]).max())
    return f"differ by {largest:.1e} at seed {seed}, step {step}"


def _vector(observation: Mapping[str, Any]) -> np.ndarray:
    parts = [np.atleast_1d(observation[key]) for key in LOW_DIM_KEYS]
    return np.concatenate(parts).astype(np.float32)


def run_task(name: str, steps: int) -> tuple[str, bool]:
    """The task's line of the table, and whether all observations were the same."""
    task = demo_task(name).env_name
    ours, stock = Ours(task), Stock(task)
    fast, slow, difference = compare(ours, stock, steps)
    ours.close()
    stock.close()
    rate, stock_rate = fast.steps_per_second, slow.steps_per_second
    line = f"{name:<8}{rate:>10.0f}{stock_rate:>10.0f}{rate / stock_rate:>8.1f}"
    line += f"{fast.reset_ms:>12.1f}{slow.reset_ms:>10.1f}  {difference or 'identical'}"
    return line, difference is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(DEMO_TASKS)
    parser.add_argument("--tasks", nargs="+", default=known, help=", ".join(known))
    parser.add_argument("--steps", type=int, default=1000, help="control steps a task and side")
    options = parser.parse_args(arguments)
    same = []
    try:
        if options.steps < 1:
            raise UserError(f"--steps {options.steps}: it must be at least 1")
        for name in options.tasks:
            demo_task(name)
        print(f"{'':<8}{'steps per CPU-second':>28}{'reset, ms':>22}")
        print(f"{'task':<8}{'ours':>10}{'stock':>10}{'ratio':>8}{'ours':>12}{'stock':>10}", end="")
        print("  observations")
        for name in options.tasks:
            line, identical = run_task(name, options.steps)
            print(line, flush=True)
            same.append(identical)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())

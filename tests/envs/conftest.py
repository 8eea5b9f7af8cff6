"""Simulators shared by the tests: making one costs a second, the first one many."""

import os
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_trqam.data.episode import Episode
from vla_trqam.envs import pool_worker, worker
from vla_trqam.envs.base import EnvFamily, TaskEnv
from vla_trqam.envs.robomimic.env import RobomimicEnv, create_robomimic_env, env_meta_for
from vla_trqam.envs.rollout import RolloutPool

pytest.register_assert_rewrite("family_contract")


@pytest.fixture(scope="class")
def family(request: pytest.FixtureRequest) -> EnvFamily:
    """Of a subclass of `FamilyContract`."""
    made: EnvFamily = request.cls().make_family()
    return made


@pytest.fixture(scope="class")
def env(family: EnvFamily) -> Iterator[TaskEnv]:
    """Made as a simulator process makes it: from what was pickled."""
    made = pickle.loads(pickle.dumps(family.make))(False)
    yield made
    made.close()


@pytest.fixture(scope="class")
def episodes(family: EnvFamily) -> list[Episode]:
    """Played by two processes."""
    from family_contract import HORIZON, SEEDS, chunks_of

    with RolloutPool(family, chunk_length=HORIZON, num_workers=2) as pool:
        return pool.run(chunks_of(family), SEEDS)


class ThreadInsteadOfProcess:
    """Serves a pool from a thread: saves the seconds that a process needs to import robosuite."""

    def __init__(self, command, **_):
        self.thread = threading.Thread(target=self.serve, args=[os.dup(int(command[-1]))])
        self.thread.start()

    def serve(self, handle):
        with Connection(handle) as connection:
            worker.serve(connection)

    def kill(self):
        self.thread.join()

    def wait(self, timeout=None):
        self.thread.join(timeout)
        return 0


@pytest.fixture
def in_thread(monkeypatch):
    stand_in = SimpleNamespace(Popen=ThreadInsteadOfProcess, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(pool_worker, "subprocess", stand_in)


@pytest.fixture(scope="session")
def lift() -> Iterator[RobomimicEnv]:
    env = RobomimicEnv(env_meta_for("Lift"), max_episode_steps=60)
    yield env
    env.close()


@pytest.fixture(scope="session")
def square() -> Iterator[RobomimicEnv]:
    env = RobomimicEnv(env_meta_for("NutAssemblySquare"), max_episode_steps=60)
    yield env
    env.close()


@pytest.fixture(scope="session")
def stock_lift() -> Any:
    return create_robomimic_env(env_meta_for("Lift"))


@pytest.fixture(scope="session")
def stock_square() -> Any:
    return create_robomimic_env(env_meta_for("NutAssemblySquare"))


@pytest.fixture(scope="session")
def restless_actions() -> Callable[[int, int], np.ndarray]:
    """Large moves, many beyond [-1, 1], downwards at first; the gripper opens and closes."""

    def draw(count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        actions = 1.5 * generator.normal(size=(count, 7))
        actions[: count // 3, 2] -= 0.6
        actions[:, 6] = np.repeat(generator.choice([-1.0, 1.0], size=count // 10 + 1), 10)[:count]
        return actions

    return draw

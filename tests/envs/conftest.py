"""Simulators shared by the tests: making one costs a second, the first one many."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vla_trqam.envs.robomimic import RobomimicEnv, create_robomimic_env, env_meta_for


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

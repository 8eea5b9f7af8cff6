"""Lift's cube has another size in every episode; change it without compiling the model again."""

from typing import Any

import mujoco
import numpy as np

HALF_SIZE_RANGE = (0.020, 0.022)
"""Metres, as robosuite's Lift has it in its `_load_model`."""


def resample_cube_size(env: Any) -> None:
    """Draw a cube from `np.random` as a rebuild of robosuite's `Lift` would, and put it in place.

    Every array of the MuJoCo model is then what compiling the new cube gives (a test compares
    them all). The simulator's data are scratched: reset them afterwards.
    """
    low, high = HALF_SIZE_RANGE
    half_size = np.array([np.random.uniform(low, high) for _ in range(3)])
    env.cube.size = half_size.tolist()
    model, data = env.sim.model._model, env.sim.data._data
    body = env.cube_body_id
    first = model.body_geomadr[body]
    for geom in range(first, first + model.body_geomnum[body]):
        model.geom_size[geom] = half_size
        model.geom_aabb[geom, 3:] = half_size
        model.geom_rbound[geom] = np.linalg.norm(half_size)
    _set_box_inertia(model, body, half_size, env.cube.density)
    model.bvh_aabb[model.body_bvhadr[body], 3:] = half_size
    mujoco.mj_setConst(model, data)


def _set_box_inertia(model: Any, body: int, half_size: np.ndarray, density: float) -> None:
    """Mass and principal inertia of a homogeneous box: m/3 (b² + c²) for half sizes a, b, c."""
    mass = density * 8.0 * np.prod(half_size)
    a, b, c = half_size**2
    model.body_mass[body] = mass
    model.body_inertia[body] = mass * np.array([b + c, a + c, a + b]) / 3.0

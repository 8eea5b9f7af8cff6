"""Demonstrations of states given images: their actions are executed once more, and filmed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.robomimic.demo import require_group
from vla_trqam.data.sources.robomimic.hdf5 import RobomimicFile, read_robomimic, require_env_version
from vla_trqam.data.sources.robomimic.safety import Allowance, attribute, child
from vla_trqam.envs.robomimic.env_meta import TASK_DESCRIPTIONS
from vla_trqam.envs.robomimic.images import CameraSettings, RobomimicImageEnv
from vla_trqam.errors import UserError

STATE_TOLERANCE = 1e-3
"""How far (m, rad) a repeated demonstration may leave the recorded one."""


@dataclass(frozen=True)
class RenderedDemo:
    """A demonstration with images.

    Attributes:
        name: in the file.
        episode: its steps and images.
        objects: the recorded poses of objects (robosuite's ``object``), (T + 1, O).
    """

    name: str
    episode: Episode
    objects: np.ndarray


def render_demos(
    path: Path, cameras: CameraSettings, *, every: int, num_workers: int = 1
) -> Iterator[RenderedDemo]:
    """Every demonstration of a Robomimic file, in order.

    The simulator is set to the first recorded state and given the recorded actions.

    Args:
        path: a Robomimic HDF5 file of robosuite 1.5, with the first ``states`` of every demo.
        cameras: what to see.
        every: steps from frame to frame; the state at which a time limit cut is seen as well.
        num_workers: processes.

    Raises:
        UserError: the file cannot be read, has no states, or a repeated demonstration leaves its
            record by more than :data:`STATE_TOLERANCE`.
    """
    file = read_robomimic(path)
    require_env_version(file)
    names = [demo.name for demo in file.demos]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start, initargs=(path, cameras, every)
    ) as pool:
        yield from pool.map(_render, names)


_worker: dict[str, Any] = {}


def _start(path: Path, cameras: CameraSettings, every: int) -> None:
    file = read_robomimic(path)
    _worker.update(
        file=file,
        demos={demo.name: demo for demo in file.demos},
        every=every,
        env=RobomimicImageEnv(
            file.env_args,
            max_episode_steps=1 + max(demo.num_steps for demo in file.demos),
            cameras=cameras.names,
            image_size=cameras.image_size,
            shadows=cameras.shadows,
            render_every=every,
        ),
    )


def _render(name: str) -> RenderedDemo:
    file, demo, env = _worker["file"], _worker["demos"][name], _worker["env"]
    seed, state = _start_of(file, name)
    seen, _ = env.reset(seed=seed, options={"state": state})
    states, frames, observed = [seen["agent_pos"]], [seen["pixels"]], [True]
    for number, action in enumerate(demo.actions, start=1):
        seen, *_, info = env.step(action)
        states.append(seen["agent_pos"])
        cut = number == demo.num_steps and not demo.success
        if cut and not info["frame_is_new"]:
            seen = env.look_again()
        observed.append(cut or (bool(info["frame_is_new"]) and number < demo.num_steps))
        if observed[-1]:
            frames.append(seen["pixels"])
    _check_drift(file, name, np.stack(states), demo.observations)
    episode = Episode(
        observations=np.stack(states),
        images={camera: np.stack([f[camera] for f in frames]) for camera in frames[0]},
        observed=np.array(observed),
        actions=demo.actions,
        rewards=demo.rewards,
        terminated=demo.success,
        truncated=not demo.success,
        success=demo.success,
        task=TASK_DESCRIPTIONS[file.env_args["env_name"]],
    )
    return RenderedDemo(name, episode, demo.observations[:, len(states[0]) :])


def _start_of(file: RobomimicFile, name: str) -> tuple[int | None, np.ndarray]:
    """The reset's seed, where the file has it, and the first state.

    The state has no sizes of objects, which robosuite draws at the reset.
    """
    with h5py.File(file.path) as stored:
        where = f"{file.path}: {name}"
        group = require_group(require_group(stored, "data", str(file.path)), name, where)
        states = child(group, "states", where)
        if not isinstance(states, h5py.Dataset):
            raise UserError(f"{where} has no 'states'; there is nothing to repeat from.")
        Allowance(file.path).take(states, f"{where}: 'states'")
        seed = attribute(group, "seed", where)
        return None if seed is None else int(seed), np.asarray(states[0])


def _check_drift(file: RobomimicFile, name: str, states: np.ndarray, recorded: np.ndarray) -> None:
    # A file need not hold the state after the last step: the reader then repeats the one before.
    drift = float(np.abs(states - recorded[:, : states.shape[1]])[:-1].max())
    if drift > STATE_TOLERANCE:
        raise UserError(
            f"{file.path}: repeated, {name} leaves its record by {drift:.2g} (at most "
            f"{STATE_TOLERANCE:g} is allowed); it was made by another version of the simulator."
        )


def initial_scenes(
    env: RobomimicImageEnv, seeds: Sequence[int], moves: int, generator: np.random.Generator
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Scenes of a task before anything has happened, the arm moved about at random.

    Yields:
        What is seen, and the objects' poses (robosuite's ``object``).
    """
    for seed in seeds:
        env.reset(seed=seed)
        for direction in generator.uniform(-1.0, 1.0, (2, 7)).astype(np.float32):
            for _ in range(int(generator.integers(0, moves // 2 + 1))):
                env.step(direction)
        yield env.look_again(), env.object_poses()

"""Pretraining of a tiny flow VLA: its vision-language model on poses, its expert on actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from vla_trqam.adapters.critic_features import mean_over_valid
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.critic import ema_update
from vla_trqam.data.frames import image_key

EMA_RATE = 0.002
YAW_SCALE = 0.03
"""Metres that a full turn of the yaw's circle counts for: as much as the object's position."""
SMALLEST_STD = 1e-2
SMALLEST_SPREAD = 1e-3
"""Metres; what no scene moves is not to be learnt to the last digit."""

Progress = Callable[[int, dict[str, float]], None]
"""Told the steps done and what they found."""


@dataclass(frozen=True)
class Scenes:
    """N single looks at a scene.

    Attributes:
        images: by camera, (N, H, W, 3) uint8.
        states: raw, (N, S) float32.
        poses: where things are (m), in P numbers, (N, P) float32.
        texts: what is to be done.
        told: which of the texts at each look, (N,) int.
    """

    images: Mapping[str, np.ndarray]
    states: np.ndarray
    poses: np.ndarray
    texts: Sequence[str]
    told: np.ndarray

    def __len__(self) -> int:
        return len(self.states)


class Looks:
    """Scenes as a policy's preprocessor gives them."""

    def __init__(self, policy: LeRobotFlowPolicy, scenes: Scenes) -> None:
        self.scenes = scenes
        assert policy.processors is not None
        self._states = policy.processors.normalize(OBS_STATE, torch.from_numpy(scenes.states))
        first = np.zeros(len(scenes.texts), dtype=np.int64)
        state = {OBS_STATE: torch.from_numpy(scenes.states[first])}
        seen = policy.processors.observe(self._images(first) | state | {"task": [*scenes.texts]})
        self._text = {k: seen[k] for k in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)}

    def at(self, index: np.ndarray) -> dict[str, Tensor]:
        """The looks with these numbers, (B,)."""
        told = torch.from_numpy(self.scenes.told[index])
        text = {key: value[told] for key, value in self._text.items()}
        return self._images(index) | {OBS_STATE: self._states[index]} | text

    def _images(self, index: np.ndarray) -> dict[str, Tensor]:
        return {
            image_key(camera): torch.from_numpy(images[index]).permute(0, 3, 1, 2).float() / 255
            for camera, images in self.scenes.images.items()
        }


def pose_targets(objects: np.ndarray) -> np.ndarray:
    """Robosuite's ``object`` observation of a cube, (N, 10), as what a model is to learn, (N, 5).

    Position (m), and the yaw as a point on a circle that a quarter turn goes round once: a cube
    looks the same after it.
    """
    x, y, z, w = objects[:, 3:7].T
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    circle = YAW_SCALE * np.stack([np.cos(4 * yaw), np.sin(4 * yaw)], axis=1)
    return np.concatenate([objects[:, :3], circle], axis=1).astype(np.float32)


def statistics(states: np.ndarray, actions: np.ndarray, cameras: tuple[str, ...]) -> dict[str, Any]:
    """Of states (N, S) and actions (N, A), as a LeRobot dataset holds them; images stay raw."""
    raw = {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 1.0, "q01": 0.0, "q99": 1.0}
    image = {name: torch.full((3, 1, 1), value) for name, value in raw.items()}
    images = {image_key(camera): image for camera in cameras}
    return {OBS_STATE: _of(states), "action": _of(actions)} | images


def _of(values: np.ndarray) -> dict[str, Tensor]:
    found = {
        "mean": values.mean(axis=0),
        # Sensors that hardly move would be blown up to unit variance.
        "std": values.std(axis=0).clip(min=SMALLEST_STD),
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in found.items()}


def learn_poses(
    policy: LeRobotFlowPolicy,
    scenes: Scenes,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Progress,
) -> None:
    """Trains the vision-language model so that a linear map of its averaged states is the pose.

    By Adam, whose step size ``lr`` falls linearly to zero; the action expert stays as it is.
    """
    torch.manual_seed(seed)
    looks, host = Looks(policy, scenes), policy.host
    prefix = _prefix_parameters(policy)
    targets = torch.from_numpy(scenes.poses)
    mean, std = targets.mean(dim=0), targets.std(dim=0).clamp(min=SMALLEST_SPREAD)
    head = nn.Linear(policy.family.prefix_width(host), targets.shape[1])
    layers = len(policy.family.prefix_layers(host))

    def loss(index: np.ndarray) -> Tensor:
        found = policy.family.encode(host, looks.at(index), layers)
        poses = head(mean_over_valid(found.states, found.valid))
        return (poses - (targets[index] - mean) / std).square().mean()

    with _trained(prefix):
        weights = [*prefix, *head.parameters()]
        for value in _descend(weights, loss, len(scenes), steps, batch_size, lr, seed):
            progress(1, {"pose_loss": value})


@torch.no_grad()
def cached_prefixes(
    policy: LeRobotFlowPolicy, scenes: Scenes, *, batch_size: int = 256
) -> dict[str, Tensor]:
    """What the frozen prefix makes of every scene, by name: (N, ...)."""
    looks = Looks(policy, scenes)
    parts = [
        policy.packed(looks.at(np.arange(first, min(first + batch_size, len(scenes)))))
        for first in range(0, len(scenes), batch_size)
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def clone_demonstrations(
    policy: LeRobotFlowPolicy,
    prefixes: Mapping[str, Tensor],
    chunks: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Progress,
) -> None:
    """Trains the action expert on the flow-matching loss; the average of its weights is kept.

    Args:
        policy: without adapters, trained in full.
        prefixes: of N observations, see :func:`cached_prefixes`.
        chunks: of actions in the robot's units, (N, H, a).
        steps: updates.
        batch_size: observations a batch.
        lr: Adam's step size; it falls linearly to zero.
        seed: of batches and noise.
        progress: told the loss.
    """
    expert = list(policy.trainable_parameters())
    actions = policy.from_robot(torch.from_numpy(chunks))
    generator = torch.Generator().manual_seed(seed)
    average = [parameter.detach().clone() for parameter in expert]

    def loss(index: np.ndarray) -> Tensor:
        context = policy.encode({key: value[index] for key, value in prefixes.items()})
        batch = actions[index]
        noise = torch.randn(batch.shape, generator=generator)
        return policy.behaviour_loss(
            context, batch, noise, torch.rand(len(batch), generator=generator)
        )

    steps_done = 0
    for value in _descend(expert, loss, len(chunks), steps, batch_size, lr, seed):
        steps_done += 1
        ema_update(average, expert, max(EMA_RATE, 1.0 / steps_done))
        progress(1, {"bc_loss": value})
    ema_update(expert, average, 1.0)


def _prefix_parameters(policy: LeRobotFlowPolicy) -> list[nn.Parameter]:
    """All but the action expert; what the features do not depend on gets no gradient."""
    trained = {id(parameter) for parameter in policy.trainable_parameters()}
    return [p for p in policy.host.parameters() if id(p) not in trained]


@contextmanager
def _trained(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters require gradients inside the context only."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _descend(
    parameters: list[nn.Parameter],
    loss: Callable[[np.ndarray], Tensor],
    count: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Iterator[float]:
    """Adam on batches of indices below ``count``; yields every step's loss."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * (1.0 - step / steps)
        value = loss(generator.integers(0, count, batch_size))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield float(value.detach())

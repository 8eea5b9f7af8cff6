"""A flow policy on images, small enough for tests: its features are the image's mean and state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vla_trqam.data.episode import Episode
from vla_trqam.data.frames import STATE_KEY, image_key
from vla_trqam.data.replay import Replay
from vla_trqam.policy import FlowPolicy

HORIZON, ACTION, STATE, CAMERA, TASK = 2, 2, 3, "front", "come near"


class PackedPolicy(FlowPolicy):
    """Linear fields over four features, which are computed from images or given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = 1 + STATE + 1 + HORIZON * ACTION
        self.tuned, self.base = nn.Linear(size, HORIZON * ACTION), nn.Linear(size, HORIZON * ACTION)
        self.base.load_state_dict(self.tuned.state_dict())
        self.base.requires_grad_(False)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        return HORIZON, ACTION

    @property
    def num_flow_steps(self) -> int:
        return 4

    @property
    def feature_dim(self) -> int:
        return 1 + STATE

    def packed(self, observation: Any) -> dict[str, Tensor]:
        seen = observation[image_key(CAMERA)]
        seen = seen.float() / 255 if seen.dtype == torch.uint8 else seen
        picture = seen.flatten(1).mean(dim=1, keepdim=True)
        return {"features": torch.cat([picture, observation[STATE_KEY]], dim=1)}

    def encode(self, observation: Any) -> Tensor:
        return (observation if "features" in observation else self.packed(observation))["features"]

    def features(self, context: Tensor) -> Tensor:
        return context

    def _field(self, layer: nn.Linear, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        return layer(torch.cat([context, tau[:, None], x.flatten(1)], dim=1)).view_as(x)

    def velocity(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        return self._field(self.tuned, x, tau, context)

    def base_velocity(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        return self._field(self.base, x, tau, context)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return self.tuned.parameters()

    def save_pretrained(self, directory: Path) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        raise NotImplementedError


def frame_episode(steps: int, *, success: bool, seed: int) -> Episode:
    """An episode with a frame every `HORIZON` steps."""
    rng = np.random.default_rng(seed)
    observed = np.arange(steps + 1) % HORIZON == 0
    observed[-1] = not success
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = success
    return Episode(
        observations=rng.normal(size=(steps + 1, STATE)).astype(np.float32),
        images={CAMERA: rng.integers(0, 256, (int(observed.sum()), 4, 4, 3), dtype=np.uint8)},
        observed=observed,
        actions=rng.uniform(-1, 1, (steps, ACTION)).astype(np.float32),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
        task=TASK,
    )


def frame_replay(path: Path) -> Replay:
    """Five episodes with images."""
    replay = Replay.create(
        path, observation_dim=STATE, action_dim=ACTION, cameras={CAMERA: (4, 4, 3)}, capacity=200
    )
    for seed in range(5):
        replay.add(frame_episode(5 + seed, success=seed % 2 == 0, seed=seed), source="dataset")
    return replay

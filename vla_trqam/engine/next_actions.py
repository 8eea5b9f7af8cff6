"""Next actions drawn before: what makes an update of the critic cheap.

The TD target of a chunk needs an action of the policy at the next observation: K evaluations of its
field, a hundred times the cost of the critic itself where the policy is a transformer. Drawn once a
frame and used again, they are as old as the policy was then: a lag, as the target network has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import Observer
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, GeneratorNoise
from vla_trqam.policy import FlowPolicy

FRAME = "frame"
"""The number of the frame in an observation of :class:`NumberedFeatures`."""
CHUNKS, DRAWN, UPDATES = "chunks", "drawn", "updates"


class NumberedFeatures(Observer[FrameObservation]):
    """Cached features of a replay's frames, and the frames' numbers (B,)."""

    def __init__(
        self, cache: FeatureCache, replay: Replay, names: tuple[str, ...] | None = None
    ) -> None:
        self._cache, self._replay, self._names = cache, replay, names

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether a frame was taken."""
        return self._cache.known(rows)

    def at(self, rows: np.ndarray) -> FrameObservation:
        """The features of the frames at these rows, and their numbers."""
        frames = self._replay.frame_index.frames(rows)
        return self._cache.at(rows, self._names) | {FRAME: torch.from_numpy(frames)}


class NextActions(nn.Module):
    """A few chunks of the policy at every frame of a replay, as the robot executes them.

    Args:
        policy: which sees the frames.
        actor: whose chunks.
        replay: whose frames.
        cache: of their features.
        chunks_per_frame: M, kept at every frame; a target takes a random one.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        actor: Actor,
        replay: Replay,
        cache: FeatureCache,
        *,
        chunks_per_frame: int,
    ) -> None:
        super().__init__()
        if chunks_per_frame < 1:
            raise UserError(f"critic.next_actions is {chunks_per_frame}; it must be at least 1")
        self._policy = (policy,)  # in a tuple: its weights are not this module's
        self._actor = actor
        self._replay = replay
        self._observer = NumberedFeatures(cache, replay)
        horizon, real = policy.chunk_shape[0], int(policy.action_mask.sum())
        device = next(policy.trainable_parameters()).device
        shape = (replay.frame_capacity, chunks_per_frame, horizon, real)
        self.num_known = 0
        self.chunks: Tensor
        self.register_buffer(CHUNKS, torch.zeros(shape, device=device))
        self.drawn: Tensor  # the policy's updates when a chunk was drawn
        self.register_buffer(DRAWN, torch.zeros(shape[:2], dtype=torch.int64, device=device))
        self.updates: Tensor  # of the policy, so far
        self.register_buffer(UPDATES, torch.zeros((), dtype=torch.int64, device=device))
        self._ages_known = True

    @torch.no_grad()
    def fill(self, generator: torch.Generator, *, batch_size: int = 256) -> int:
        """Draws the chunks of frames that have none yet; returns how many frames these were."""
        rows = self._replay.frame_index.rows_of_frames()
        first = self.num_known
        for start in range(first, len(rows), batch_size):
            part = rows[start : start + batch_size]
            drawn = self._draw(part, generator, self.chunks.shape[1])
            self.chunks[start : start + len(part)] = drawn
            self.drawn[start : start + len(part)] = self.updates
        self.num_known = max(first, len(rows))
        return self.num_known - first

    def pick(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """One chunk of each of these frames (B,), chosen at random: (B, H, a)."""
        return self.chunks[frames, self._slots(frames, generator)]

    def put(self, frames: Tensor, chunks: Tensor, generator: torch.Generator) -> None:
        """Newer chunks (B, H, a) take the place of random older ones at these frames (B,)."""
        slots = self._slots(frames, generator)
        self.chunks[frames, slots] = chunks
        self.drawn[frames, slots] = self.updates

    def redraw(self, count: int, generator: torch.Generator) -> None:
        """Draws the oldest chunk of each of the frames whose chunks are the oldest, anew."""
        oldest, slots = self.drawn[: self.num_known].min(dim=1)
        frames = oldest.topk(min(count, self.num_known), largest=False).indices
        rows = self._replay.frame_index.rows_of_frames()[frames.cpu().numpy()]
        self.chunks[frames, slots[frames]] = self._draw(rows, generator, 1)[:, 0]
        self.drawn[frames, slots[frames]] = self.updates

    def policy_moved(self) -> None:
        """The policy took a step: everything drawn before is one update older."""
        self.updates += 1

    @property
    def mean_age(self) -> float | None:
        """The policy's updates since a kept chunk was drawn, on average; None if not known."""
        if not self._ages_known or self.num_known == 0:
            return None
        return float(self.updates - self.drawn[: self.num_known].double().mean())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Of the frames that have chunks; the buffers have room for all to come."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (CHUNKS, DRAWN):
            destination[prefix + name] = destination[prefix + name][: self.num_known]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + CHUNKS
        if key not in state_dict:
            missing_keys.append(key)
            return
        saved, room = state_dict[key], self.chunks.shape
        if saved.shape[1:] != room[1:] or len(saved) > len(self.chunks):
            error_msgs.append(f"{key} has shape {tuple(saved.shape)}, not {tuple(room)} or less")
            return
        self.num_known = len(saved)
        self.chunks[: self.num_known] = saved
        # Checkpoints from before the ages were kept have none.
        self._ages_known = prefix + DRAWN in state_dict
        if self._ages_known:
            self.drawn[: self.num_known] = state_dict[prefix + DRAWN]
            self.updates.copy_(state_dict[prefix + UPDATES])

    def _slots(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(
            self.chunks.shape[1], frames.shape, generator=generator, device=generator.device
        )

    def _draw(self, rows: np.ndarray, generator: torch.Generator, count: int) -> Tensor:
        """So many chunks at every row: (N, count, H, a)."""
        (policy,) = self._policy
        device = self.chunks.device
        observed = self._observer.at(rows)
        context = policy.encode({k: v.to(device) for k, v in observed.items()})  # type: ignore[union-attr]
        noise = GeneratorNoise(generator, len(rows), device)
        drawn = [policy.executed(self._actor.chunk(context, noise)) for _ in range(count)]
        return torch.stack(drawn, dim=1)

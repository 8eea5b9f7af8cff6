"""Next actions drawn before: what makes an update of the critic cheap.

The TD target of a chunk needs an action of the policy at the next observation: K evaluations of its
field, a hundred times the cost of the critic itself where the policy is a transformer. Drawn once a
frame and used again, they are as old as the policy was then: a lag, as the target network has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_trqam.data.feature_cache import FRAME
from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import Observer
from vla_trqam.data.transitions import Field
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, GeneratorNoise, Noise
from vla_trqam.policy import FlowPolicy

CHUNKS, DRAWN, UPDATES = "chunks", "drawn", "updates"
FIRST_CHUNKS = "first_chunks"
"""The M chunks (B, M, n, a) that are drawn where no prefix is kept, as a frame's is computed."""


ROWS, ROOM = 256, 2**30
"""Frames whose chunks are drawn at a time, and bytes of their prefixes: 15 MB each of a π0."""


class NextActions(nn.Module):
    """A few chunks of the policy at every frame of a replay, as the robot executes them.

    Args:
        policy: which sees the frames.
        actor: whose chunks.
        first_actor: whose chunks before the policy's first update; None for the same.
        replay: whose frames.
        prefixes: what the policy encodes of them.
        chunks_per_frame: M, kept at every frame; a target takes a random one.
        precision: what the networks compute in.
        first: of frames that have no chunks yet, those that were drawn when they were first seen
            (:data:`FIRST_CHUNKS`); None draws them when they are wanted.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        actor: Actor,
        replay: Replay,
        prefixes: Observer[FrameObservation],
        *,
        chunks_per_frame: int,
        first_actor: Actor | None = None,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        first: Observer[FrameObservation] | None = None,
    ) -> None:
        super().__init__()
        if chunks_per_frame < 1:
            raise UserError(f"critic.next_actions is {chunks_per_frame}; it must be at least 1")
        self._policy = (policy,)  # in a tuple: its weights are not this module's
        self._actor, self._first_actor = actor, first_actor or actor
        self._replay = replay
        self._prefixes, self._first, self._precision = prefixes, first, precision
        length, real = policy.executed_length, int(policy.action_mask.sum())
        device = next(policy.trainable_parameters()).device
        shape = (replay.frame_capacity, chunks_per_frame, length, real)
        self.num_known = 0
        # Of this revision and number of episodes: the frames at which chunks begin.
        self._beginning: tuple[tuple[int, int], np.ndarray] | None = None
        self.chunks: Tensor
        self.register_buffer(CHUNKS, torch.zeros(shape, device=device))
        self.drawn: Tensor  # the policy's updates when a chunk was drawn
        self.register_buffer(DRAWN, torch.zeros(shape[:2], dtype=torch.int64, device=device))
        self.updates: Tensor  # of the policy, so far
        self.register_buffer(UPDATES, torch.zeros((), dtype=torch.int64, device=device))
        self._ages_known = True

    @property
    def num_missing(self) -> int:
        """Frames that have no chunks yet."""
        return max(0, self._replay.num_frames - self.num_known)

    @torch.no_grad()
    def fill(self, generator: torch.Generator, *, batch_size: int | None = None) -> int:
        """Draws the chunks of frames that have none yet; returns how many frames these were.

        Args:
            generator: of the noise.
            batch_size: frames at a time; None takes :data:`ROWS`, fewer of large prefixes.
        """
        if not self.num_missing:  # asked before every update, where the rows are many
            return 0
        rows = self._replay.frame_index.rows_of_frames()
        first = self.num_known
        many = batch_size or self._rows_at_once(rows[first : first + 1])
        for start in range(first, len(rows), many):
            part = rows[start : start + many]
            self.chunks[start : start + len(part)] = self._first_chunks(part, generator)
            self.drawn[start : start + len(part)] = self.updates
        self.num_known = len(rows)
        return self.num_known - first

    def _rows_at_once(self, one: np.ndarray) -> int:
        """So many that their prefixes, one for each chunk, keep to :data:`ROOM`."""
        if self._first is not None or not len(one):
            return ROWS  # no prefix is touched
        seen = self._prefixes.at(one)
        size = sum(entry.nbytes for entry in seen.values() if isinstance(entry, Tensor))
        return max(1, min(ROWS, ROOM // (max(size, 1) * self.chunks.shape[1])))

    def pick(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """One chunk of each of these frames (B,), chosen at random: (B, n, a)."""
        return self.chunks[frames, self._slots(frames, generator)]

    def put(self, frames: Tensor, chunks: Tensor, generator: torch.Generator) -> None:
        """Newer chunks (B, n, a) take the place of random older ones at these frames (B,)."""
        slots = self._slots(frames, generator)
        self.chunks[frames, slots] = chunks[_last_of_same(frames * self.chunks.shape[1] + slots)]
        self.drawn[frames, slots] = self.updates

    def redraw(self, count: int, generator: torch.Generator) -> None:
        """Draws the oldest chunk of each of the frames whose chunks are the oldest, anew."""
        oldest, slots = self.drawn[: self.num_known].min(dim=1)
        frames = oldest.topk(min(count, self.num_known), largest=False).indices
        rows = self._replay.frame_index.rows_of_frames()[frames.cpu().numpy()]
        self.chunks[frames, slots[frames]] = self._draw(rows, generator, 1)[:, 0]
        self.drawn[frames, slots[frames]] = self.updates

    def draw_at(self, seen: Mapping[str, Field], generator: torch.Generator) -> None:
        """Newer chunks at the frames of a batch, whose prefixes are at hand."""
        frames = seen[FRAME]
        assert isinstance(frames, Tensor)
        noise = GeneratorNoise(generator, len(frames), self.chunks.device)
        self.put(frames, self.drawn_of(seen, noise, 1)[:, 0], generator)

    def draw_ends(self, frames: Tensor, starts: np.ndarray, generator: torch.Generator) -> None:
        """Newer chunks at those of these frames at which no chunk begins.

        These are the last of an episode that was cut, which :meth:`draw_at` never meets.

        Args:
            frames: (B,) that a batch bootstraps from.
            starts: (N,) rows of observations at which chunks begin.
            generator: of the noise.
        """
        index = self._replay.frame_index
        state = self._replay.revision, self._replay.num_episodes
        if self._beginning is None or self._beginning[0] != state:
            begins = np.zeros(index.num_frames, dtype=bool)
            begins[index.frames(starts)] = True
            self._beginning = state, begins
        ends = np.unique(frames.cpu().numpy())
        ends = ends[~self._beginning[1][ends]]
        if len(ends):
            drawn = self._draw(index.rows_of_frames()[ends], generator, 1)[:, 0]
            self.put(torch.from_numpy(ends).to(frames.device), drawn, generator)

    @torch.no_grad()
    def drawn_of(self, seen: Mapping[str, Field], noise: Noise, count: int) -> Tensor:
        """So many chunks at each of these frames, (N, count, n, a).

        Args:
            seen: what the policy encodes of the frames.
            noise: of N chunks at a time.
            count: of chunks.
        """
        (policy,) = self._policy
        actor = self._actor if self.updates else self._first_actor
        with self._precision():
            context = policy.encode(seen)
            drawn = [policy.executed(actor.chunk(context, noise)) for _ in range(count)]
        return torch.stack(drawn, dim=1)

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

    def _first_chunks(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        if self._first is None:
            return self._draw(rows, generator, self.chunks.shape[1])
        kept = self._first.at(rows)[FIRST_CHUNKS]
        assert isinstance(kept, Tensor)
        return kept.to(self.chunks.device)

    def _draw(self, rows: np.ndarray, generator: torch.Generator, count: int) -> Tensor:
        """So many chunks at every row: (N, count, n, a)."""
        device = self.chunks.device
        seen = {k: _moved(v, device) for k, v in self._prefixes.at(rows).items()}
        return self.drawn_of(seen, GeneratorNoise(generator, len(rows), device), count)


def _moved(entry: Field, device: torch.device) -> Field:
    return entry.to(device) if isinstance(entry, Tensor) else entry


def _last_of_same(places: Tensor) -> Tensor:
    """(B,) of every place the last row that has it.

    On a GPU one of several values that are written to one place is kept, any of them; so all of
    them must be the same.
    """
    rows = torch.arange(len(places), device=places.device)
    return ((places[:, None] == places) * rows).amax(dim=1)

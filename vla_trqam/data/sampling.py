"""Uniform sampling of action chunks from a replay buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal

import numpy as np
import torch

from vla_trqam.data.transitions import Observation, TransitionBatch, chunk_return
from vla_trqam.errors import UserError

if TYPE_CHECKING:
    from vla_trqam.data.recorded import RecordedEpisodes

RewardKind = Literal["success_minus_one", "sparse", "column"]
AnyReward = RewardKind | Literal["dense"]
"""`dense` besides, where a simulator has rewards of its own for data and rollouts alike."""
ShortChunks = Literal["drop", "pad"]
Generator = np.random.Generator | torch.Generator

_DESCRIPTIONS: dict[str, str] = {
    "success_minus_one": "-1 on every step until success, 0 on the step that succeeds, and "
    "-1 for ever after a failure that ends an episode",
    "sparse": "1 on the step that succeeds, 0 on every other",
    "column": "the reward column as it is stored",
    "dense": "minus the number of the task's parts that are not yet right",
}

SUCCESS_REWARDS: dict[str, tuple[float, float]] = {
    "success_minus_one": (-1.0, 0.0),
    "sparse": (0.0, 1.0),
}
"""What a step can get by the kinds that are made of success: the least and the largest."""


@dataclass(frozen=True)
class RewardSpec:
    """What the critic is to maximise, made from the stored reward.

    Attributes:
        kind: `success_minus_one` is r - 1 and `sparse` is r, both for a stored success reward r
            in {0, 1}; `column` takes whatever is stored, and so does `dense`, of which rollouts
            store the same.
        of_sources: name -> kind of a replay's sources that have one of their own, because other
            numbers are stored of them. All must come to one scale: a critic learns one reward.
    """

    kind: AnyReward = "success_minus_one"
    of_sources: Mapping[str, RewardKind] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind in (self.kind, *self.of_sources.values()):
            if kind not in _DESCRIPTIONS:
                known = ", ".join(_DESCRIPTIONS)
                raise UserError(f"Unknown reward '{kind}': choose one of {known}.")

    @property
    def label(self) -> str:
        """The kind, and those of sources that have their own."""
        own = ", ".join(f"{name}: {kind}" for name, kind in self.of_sources.items())
        return f"{self.kind} ({own})" if own else self.kind

    def describe(self) -> str:
        """One line for the recipe to print at the start."""
        return f"reward {self.kind}: {_DESCRIPTIONS[self.kind]}"

    def apply(self, stored: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
        """Stored rewards -> rewards to learn from, same shape.

        Args:
            stored: (N, ...).
            source: (N,) names of where they come from; None where none has a kind of its own.

        Raises:
            UserError: the kind wants a success reward and something besides 0 and 1 is stored.
        """
        if source is not None and self.of_sources:
            learned = np.array(stored)
            for name in np.unique(source):
                kind = self.of_sources.get(str(name), self.kind)
                learned[source == name] = RewardSpec(kind).apply(stored[source == name])
            return learned
        if self.kind not in SUCCESS_REWARDS:
            return stored
        strange = stored[(stored != 0) & (stored != 1)]
        if strange.size:
            raise UserError(
                f"The replay holds the reward {strange[0]:g}, but the reward '{self.kind}' is made "
                "from a success reward of 0 or 1: use the reward 'column'."
            )
        return stored - 1 if self.kind == "success_minus_one" else stored

    def after_failure(self, discount: float, source: np.ndarray) -> np.ndarray:
        """(N,) the return of all steps after a failure that ended an episode.

        `success_minus_one` goes on at -1 in a failure that no action ends: -1 / (1 - γ). Without
        that it would pay to fail early. Other kinds get nothing any more.

        Args:
            discount: γ.
            source: (N,) names of where the episodes come from.

        Raises:
            UserError: the return is infinite.
        """
        kinds = np.array([self.of_sources.get(str(name), self.kind) for name in source], np.str_)
        goes_on = kinds == "success_minus_one"
        if goes_on.any() and discount == 1:
            raise UserError(
                "An episode ends in failure, which the reward 'success_minus_one' counts at -1 a "
                "step for ever: that wants a discount below 1."
            )
        return np.where(goes_on, -1 / (1 - discount) if discount < 1 else 0.0, 0.0)


# One row for every admissible start of a chunk, with what needs no observation. One packed table
# instead of one array a field: a random row then costs one cache miss, which halves the time.
_START = np.dtype(
    [
        ("step", np.int64),
        ("observation_row", np.int64),
        ("chunk_return", np.float32),
        ("num_steps", np.int32),  # n: the episode's end may cut the chunk short
        ("num_actions", np.int32),  # those of the flow's chunk that the episode has
        ("terminated", np.bool_),
        ("truncated", np.bool_),
    ],
    align=True,
)


class Observer(ABC, Generic[Observation]):  # noqa: UP046 (the default)
    """What is seen at the rows of `Replay.observations`."""

    @abstractmethod
    def known(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bool: whether anything was observed at these rows."""

    @abstractmethod
    def at(self, rows: np.ndarray) -> Observation:
        """The observations at rows (B,); of a row that is not known any observation will do."""


class VectorObserver(Observer[torch.Tensor]):
    """The rows themselves, (B, O) float32, all of them known."""

    def __init__(self, buffer: RecordedEpisodes) -> None:
        """Observe the buffer's own rows."""
        self._buffer = buffer

    def known(self, rows: np.ndarray) -> np.ndarray:
        """Every one."""
        return np.ones(len(rows), dtype=bool)

    def at(self, rows: np.ndarray) -> torch.Tensor:
        """(B, O)."""
        return torch.from_numpy(self._buffer.observations.take(rows, axis=0))


class ChunkSampler(Generic[Observation]):  # noqa: UP046 (the default)
    """Draws chunks uniformly from all admissible starts of a replay buffer.

    Episodes added to the buffer later are seen by the next call of `sample`.
    """

    def __init__(
        self,
        buffer: RecordedEpisodes,
        observer: Observer[Observation],
        *,
        chunk_length: int,
        discount: float,
        short_chunks: ShortChunks,
        reward: RewardSpec,
        flow_length: int | None = None,
        next_observer: Observer[Observation] | None = None,
        sources: Collection[str] | None = None,
        repeats: Mapping[str, int] | None = None,
    ) -> None:
        """Use `Replay.sampler`, which documents the arguments."""
        if chunk_length < 1:
            raise UserError(f"The chunk length is {chunk_length}; it must be at least 1.")
        if flow_length is not None and flow_length < chunk_length:
            raise UserError(
                f"The flow's chunks have {flow_length} actions, fewer than the {chunk_length} that "
                "are executed."
            )
        if not 0 < discount <= 1:
            raise UserError(f"The discount is {discount}; it must lie in (0, 1].")
        if short_chunks not in ("drop", "pad"):
            raise UserError(f"short_chunks is '{short_chunks}'; it must be 'drop' or 'pad'.")
        self.buffer = buffer
        self.observer, self.next_observer = observer, next_observer or observer
        self.chunk_length = chunk_length
        self.flow_length = flow_length or chunk_length
        self.discount = discount
        self.short_chunks = short_chunks
        self.reward = reward
        self.sources = None if sources is None else frozenset(sources)
        self.repeats = dict(repeats or {})
        # Looked up by how many steps were taken: γ^n, which entries are real, and where the
        # entries' actions lie, counted from the chunk's start: the tail repeats the last one.
        n, offset = np.arange(self.flow_length + 1), np.arange(self.flow_length)
        self._discount_of = (discount**n).astype(np.float32)
        self._valid_of = offset < n[:, None]
        self._offset_of = np.minimum(offset, np.maximum(n[:, None] - 1, 0))
        self._rebuild()

    @property
    def buffers(self) -> tuple[RecordedEpisodes, ...]:
        """Where chunks are drawn from."""
        return (self.buffer,)

    @property
    def num_starts(self) -> int:
        """How many chunks can be drawn now, one that counts several times so often."""
        self._catch_up()
        return len(self._starts)

    @property
    def distinct(self) -> np.ndarray:
        """(N,) the number of every chunk, once where it counts several times."""
        self._catch_up()
        return np.flatnonzero(np.diff(self._starts["step"], prepend=-1))

    def sample(self, batch_size: int, generator: Generator) -> TransitionBatch[Observation]:
        """Draw `batch_size` chunks with replacement, every admissible start equally likely.

        The only state is the generator's: the same generator state and the same episodes give the
        same batch.

        Raises:
            UserError: there is no admissible start.
        """
        num_starts = self.num_starts
        if num_starts == 0:
            raise UserError(
                f"The replay {self.buffer.path} has no episode with a chunk of "
                f"{self.chunk_length} steps to draw."
            )
        return self.gather(draw_indices(num_starts, batch_size, generator))

    def gather(self, index: np.ndarray) -> TransitionBatch[Observation]:
        """The chunks with these numbers, (B,), each in [0, num_starts)."""
        # take() is about twice as fast here as indexing with an array.
        starts = self._starts.take(index)
        num_steps, num_actions = starts["num_steps"], starts["num_actions"]
        observation_row = starts["observation_row"]
        step = starts["step"][:, None] + self._offset_of.take(num_actions, axis=0)
        return TransitionBatch(
            observation=self.observer.at(observation_row),
            action=torch.from_numpy(self.buffer.actions.take(step, axis=0)),
            chunk_return=_tensor(starts["chunk_return"]),
            next_observation=self.next_observer.at(observation_row + num_steps),
            discount=torch.from_numpy(self._discount_of.take(num_steps)),
            terminated=_tensor(starts["terminated"]),
            truncated=_tensor(starts["truncated"]),
            valid=torch.from_numpy(self._valid_of.take(num_actions, axis=0)),
            columns={
                name: torch.from_numpy(self.buffer.column(name).take(step, axis=0))
                for name in self.buffer.columns
            },
        )

    @property
    def start_rows(self) -> np.ndarray:
        """(N,) the rows of observations at which a chunk may begin."""
        self._catch_up()
        return self._starts["observation_row"]

    @property
    def reached_steps(self) -> np.ndarray:
        """(T,) bool: the steps whose reward some chunk has."""
        self._catch_up()
        steps = self.buffer.rewards.shape[0]
        ends = np.zeros(steps + 1, dtype=np.int64)
        np.add.at(ends, self._starts["step"], 1)
        np.add.at(ends, self._starts["step"] + self._starts["num_steps"], -1)
        return ends.cumsum()[:steps] > 0

    def outcomes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What came of the chunks with these numbers.

        Returns:
            The discounted return-to-go, (B,), NaN where the episode was cut; and whether the
            episode succeeded, (B,) bool.
        """
        steps = self._starts["step"].take(index)
        episodes = self.buffer.episodes()
        episode = np.searchsorted(episodes.first_step, steps, side="right") - 1
        returns = self.buffer.returns_to_go(self.discount, self.reward)
        return returns[steps], episodes.success[episode]

    def _rebuild(self) -> None:
        self._revision = self.buffer.revision
        self._num_episodes = self.buffer.num_episodes
        self._starts = self._starts_of(slice(0, self._num_episodes))

    def _catch_up(self) -> None:
        if self._revision != self.buffer.revision:
            self._rebuild()
        elif self._num_episodes != self.buffer.num_episodes:
            new = slice(self._num_episodes, self.buffer.num_episodes)
            self._starts = np.concatenate((self._starts, self._starts_of(new)))
            self._num_episodes = new.stop

    def _starts_of(self, which: slice) -> np.ndarray:
        """All admissible starts of these episodes in order, (N,) of the dtype _START."""
        episodes = self.buffer.episodes(which)
        length = episodes.num_steps
        whole = np.maximum(length - self.chunk_length + 1, 0)
        # A chunk cut short by truncation has no s_{t+n}; one cut short by success needs none.
        count = (
            np.where(episodes.terminated, length, whole) if self.short_chunks == "pad" else whole
        )
        if self.sources is not None:
            count = np.where(np.isin(episodes.source, list(self.sources)), count, 0)
        row = np.repeat(np.arange(len(count)), count)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        remaining = length[row] - offset
        at_end = remaining <= self.chunk_length
        starts = np.empty(len(row), dtype=_START)
        starts["step"] = episodes.first_step[row] + offset
        starts["observation_row"] = episodes.first_observation[row] + offset
        starts["num_steps"] = np.minimum(remaining, self.chunk_length)
        starts["num_actions"] = np.minimum(remaining, self.flow_length)
        source = episodes.source[row] if self.reward.of_sources else None
        returns = self._chunk_returns(starts, source)
        failed = at_end & (episodes.terminated & ~episodes.success)[row]
        after = self.reward.after_failure(self.discount, episodes.source[row[failed]])
        returns[failed] += self.discount ** starts["num_steps"][failed] * after
        starts["chunk_return"] = returns
        # Success on the last step that was allowed is a success.
        starts["terminated"] = at_end & episodes.terminated[row]
        starts["truncated"] = at_end & ~episodes.terminated[row]
        return self._repeated(starts[self._observed(starts)])

    def _repeated(self, starts: np.ndarray) -> np.ndarray:
        """Every start as often as it counts, by the column that makes most of it; copies adjoin."""
        often = np.ones(len(starts), dtype=np.int64)
        for column, times in self.repeats.items():
            told = self.buffer.column(column) != 0
            told = told.any(axis=tuple(range(1, told.ndim)))  # of its numbers, such as one an arm
            so_far = np.concatenate(([0], np.cumsum(told)))
            first = starts["step"]
            tells = so_far[first + starts["num_steps"]] > so_far[first]
            often = np.maximum(often, np.where(tells, times, 1))
        return np.repeat(starts, often)

    def _observed(self, starts: np.ndarray) -> np.ndarray:
        """(N,) bool: s_t was observed, and so was s_{t+n} unless nothing is bootstrapped there."""
        first = starts["observation_row"]
        after = starts["terminated"] | self.observer.known(first + starts["num_steps"])
        return self.observer.known(first) & after

    def _chunk_returns(self, starts: np.ndarray, source: np.ndarray | None) -> np.ndarray:
        """(N,) float64, of their own steps."""
        num_steps = starts["num_steps"]
        offset = self._offset_of[num_steps, : self.chunk_length]
        rewards = self.buffer.rewards[starts["step"][:, None] + offset]
        returns = chunk_return(
            torch.from_numpy(self.reward.apply(rewards, source).astype(np.float64)),
            self.discount,
            torch.from_numpy(num_steps),
        )
        found: np.ndarray = returns.numpy()
        return found


class MixedSampler(Generic[Observation]):  # noqa: UP046 (the default)
    """Draws from offline and online data together."""

    def __init__(
        self,
        offline: ChunkSampler[Observation],
        online: ChunkSampler[Observation],
        *,
        online_fraction: float | None,
        waits: bool = False,
    ) -> None:
        """Mix two samplers of the same chunks.

        Args:
            offline: sampler of the demonstrations and other data collected before.
            online: sampler of what the policy collects itself; may still be empty if
                `online_fraction` is None.
            online_fraction: share of every batch that is online, in [0, 1], rounded to the nearest
                row. None draws uniformly from the union, so the share grows with the online data.
            waits: draws from the offline part alone as long as nothing is collected.

        Raises:
            UserError: the fraction lies outside [0, 1] or the samplers' chunk lengths differ.
        """
        if online_fraction is not None and not 0 <= online_fraction <= 1:
            raise UserError(f"The online fraction is {online_fraction}; it must lie in [0, 1].")
        lengths = [(part.chunk_length, part.flow_length) for part in (offline, online)]
        if lengths[0] != lengths[1]:
            raise UserError(
                f"The offline chunks have {lengths[0][0]} steps of {lengths[0][1]} actions and the "
                f"online ones {lengths[1][0]} of {lengths[1][1]}; they must agree."
            )
        self.offline = offline
        self.online = online
        self.online_fraction = online_fraction
        self.waits = waits

    @property
    def num_starts(self) -> int:
        """How many chunks can be drawn now, one that counts several times so often."""
        return self.offline.num_starts + self.online.num_starts

    @property
    def start_rows(self) -> np.ndarray:
        """(N,) the rows of observations at which a chunk of either may begin."""
        return np.concatenate((self.offline.start_rows, self.online.start_rows))

    def sample(self, batch_size: int, generator: Generator) -> TransitionBatch[Observation]:
        """Draw `batch_size` chunks; the offline rows come first.

        Raises:
            UserError: a part that must contribute has no admissible start.
        """
        if self.online_fraction is None:
            return self._sample_union(batch_size, generator)
        if self.waits and self.online.num_starts == 0:
            return self.offline.sample(batch_size, generator)
        num_online = round(batch_size * self.online_fraction)
        if num_online == 0:
            return self.offline.sample(batch_size, generator)
        if num_online == batch_size:
            return self.online.sample(batch_size, generator)
        return TransitionBatch.concatenate(
            self.offline.sample(batch_size - num_online, generator),
            self.online.sample(num_online, generator),
        )

    def _sample_union(self, batch_size: int, generator: Generator) -> TransitionBatch[Observation]:
        num_offline = self.offline.num_starts
        num_starts = num_offline + self.online.num_starts
        if num_starts == 0:
            raise UserError("Neither the offline nor the online replay has a chunk to draw.")
        index = draw_indices(num_starts, batch_size, generator)
        is_online = index >= num_offline
        return TransitionBatch.concatenate(
            self.offline.gather(index[~is_online]),
            self.online.gather(index[is_online] - num_offline),
        )


def draw_indices(high: int, size: int, generator: Generator) -> np.ndarray:
    """`size` independent integers, uniform over [0, high), int64."""
    if isinstance(generator, np.random.Generator):
        return generator.integers(0, high, size)
    drawn = torch.randint(high, (size,), generator=generator, device=generator.device)
    return drawn.cpu().numpy()


def _tensor(column: np.ndarray) -> torch.Tensor:
    """A contiguous tensor of one column of a packed table."""
    return torch.from_numpy(np.ascontiguousarray(column))

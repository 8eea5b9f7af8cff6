"""A replay buffer in a folder: memory-mapped arrays and a JSON header, nothing pickled.

Layout of the folder (arrays are ordinary `.npy`, allocated sparsely for the whole capacity):

    replay.json        format, sizes, how many episodes and steps count, names of the sources
    observations.npy   float32, T + 1 rows an episode: the state after the last step is kept
    actions.npy        float32, one row a step
    rewards.npy        float32, one number a step, as the environment gave it
    episodes.npy       int64, one row an episode: see `Episodes`

An episode counts from the moment the header names it. The header is replaced atomically after the
arrays are written, so a killed process leaves either the whole episode or a tail that nobody reads
and that the next episode overwrites.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vla_trqam.data.replay_files import HEADER_NAME, Column, Header, WriteLock
from vla_trqam.data.sampling import (
    ChunkSampler,
    MixedSampler,
    RewardSpec,
    ShortChunks,
    VectorObserver,
)
from vla_trqam.errors import UserError
from vla_trqam.files import sync

__all__ = ["ChunkSampler", "Episodes", "MixedSampler", "ReplayBuffer", "ReplayStats", "RewardSpec"]


@dataclass(frozen=True)
class Episodes:
    """The episode table, (E,) each.

    Attributes:
        first_step: row of the first step in `actions` and `rewards`.
        first_observation: row of the first observation in `observations`.
        num_steps: T; the episode owns T + 1 observations.
        terminated: the task ended the episode (success).
        truncated: a time limit ended it.
        success: the task was solved.
        source: name of where the episode came from.
    """

    first_step: np.ndarray
    first_observation: np.ndarray
    num_steps: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.num_steps)


@dataclass(frozen=True)
class SourceStats:
    """How much one source contributed."""

    episodes: int
    steps: int
    successes: int


@dataclass(frozen=True)
class ReplayStats:
    """What the replay holds, in total and by source."""

    episodes: int
    steps: int
    successes: int
    by_source: dict[str, SourceStats]


class ReplayBuffer:
    """Episodes in a folder, appended one by one, sampled in chunks.

    Any number of processes may read; the first one that writes locks the folder for itself until
    it closes the buffer or ends.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._header = header
        self._columns = {name: Column(path, name, spec) for name, spec in header.arrays().items()}
        self._lock = WriteLock(path)
        self.revision = 0  # changes when episodes are taken away: samplers then start afresh

    @classmethod
    def create(
        cls, path: str | Path, *, observation_dim: int, action_dim: int, capacity: int
    ) -> ReplayBuffer:
        """Make an empty replay in the folder `path`, which must not hold one yet.

        Args:
            path: folder, made if absent.
            observation_dim: O.
            action_dim: A.
            capacity: largest number of steps. Disk space is taken only as episodes come.

        Raises:
            UserError: a size is not positive or the folder already holds a replay.
        """
        folder = Path(path)
        for name, value in (
            ("observation_dim", observation_dim),
            ("action_dim", action_dim),
            ("capacity", capacity),
        ):
            if value < 1:
                raise UserError(f"The replay's {name} is {value}; it must be at least 1.")
        if (folder / HEADER_NAME).exists():
            raise UserError(f"{folder} already holds a replay: open it or name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        header = Header(observation_dim, action_dim, capacity)
        for name, spec in header.arrays().items():
            Column.allocate(folder, name, spec)
        header.write(folder)
        return cls(folder, header)

    @classmethod
    def open(cls, path: str | Path) -> ReplayBuffer:
        """Open the replay in the folder `path` for reading and appending.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return cls(Path(path), Header.read(Path(path)))

    @property
    def observation_dim(self) -> int:
        """O."""
        return self._header.observation_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return self._header.action_dim

    @property
    def capacity(self) -> int:
        """Largest number of steps."""
        return self._header.capacity

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self._header.num_episodes

    @property
    def num_steps(self) -> int:
        """Steps that count, over all episodes."""
        return self._header.num_steps

    @property
    def observations(self) -> np.ndarray:
        """Read-only map (num_steps + num_episodes, O): T + 1 rows an episode."""
        return self._columns["observations"].rows[: self.num_steps + self.num_episodes]

    @property
    def actions(self) -> np.ndarray:
        """Read-only map (num_steps, A)."""
        return self._columns["actions"].rows[: self.num_steps]

    @property
    def rewards(self) -> np.ndarray:
        """Read-only map (num_steps,), as stored."""
        return self._columns["rewards"].rows[: self.num_steps]

    @property
    def stats(self) -> ReplayStats:
        """Counts, in total and by source."""
        episodes = self.episodes()
        by_source = {}
        for name in self._header.sources:
            mine = episodes.source == name
            by_source[name] = SourceStats(
                episodes=int(mine.sum()),
                steps=int(episodes.num_steps[mine].sum()),
                successes=int(episodes.success[mine].sum()),
            )
        successes = int(episodes.success.sum())
        return ReplayStats(self.num_episodes, self.num_steps, successes, by_source)

    def episodes(self, which: slice = slice(None)) -> Episodes:
        """The table of all episodes, or of those in the slice."""
        table = self._columns["episodes"].rows[: self.num_episodes]
        number = np.arange(len(table))[which]
        first_step, num_steps, terminated, truncated, success, source = table[which].T
        return Episodes(
            first_step=first_step,
            first_observation=first_step + number,  # one extra row for every episode before
            num_steps=num_steps,
            terminated=terminated.astype(bool),
            truncated=truncated.astype(bool),
            success=success.astype(bool),
            source=np.array(self._header.sources, dtype=np.str_)[source],
        )

    def add_episode(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        *,
        terminated: bool,
        truncated: bool,
        source: str,
        success: bool,
    ) -> None:
        """Append one whole episode; it counts as soon as this returns.

        Args:
            observations: s_0..s_T, (T + 1, O).
            actions: executed actions, (T, A), in the policy's normalised space.
            rewards: (T,), as the environment gave them.
            terminated: the task ended at s_T. Wins when both ends are true.
            truncated: a time limit ended the episode at s_T.
            source: where the episode comes from, such as "demonstrations" or "online".
            success: the task was solved.

        Raises:
            UserError: shapes disagree, a number is not finite, the episode has no end or no step,
                the replay is full, or another process writes to it.
        """
        arrays = {"observations": observations, "actions": actions, "rewards": rewards}
        self._check_episode(arrays, ended=terminated or truncated)
        self.claim()
        header, num_steps = self._header, len(actions)
        sources = header.sources if source in header.sources else (*header.sources, source)
        flags = (terminated, truncated, success, sources.index(source))
        row = np.array([header.num_steps, num_steps, *flags], dtype=np.int64)
        self._columns["observations"].write(header.num_steps + header.num_episodes, observations)
        self._columns["actions"].write(header.num_steps, actions)
        self._columns["rewards"].write(header.num_steps, rewards)
        self._columns["episodes"].write(header.num_episodes, row)
        self._replace_header(header.num_episodes + 1, header.num_steps + num_steps, sources)

    def truncate_to(self, num_episodes: int) -> None:
        """Forget all but the first `num_episodes`: how a resumed run returns to its checkpoint.

        Raises:
            UserError: there are fewer episodes than that.
        """
        if not 0 <= num_episodes <= self.num_episodes:
            raise UserError(
                f"The replay {self.path} holds {self.num_episodes} episodes; it cannot be cut "
                f"back to {num_episodes}."
            )
        self.claim()
        num_steps = int(self.episodes(slice(num_episodes)).num_steps.sum())
        self._replace_header(num_episodes, num_steps, self._header.sources)
        self.revision += 1

    def grow(self, capacity: int) -> None:
        """Make room for more steps; a number below the present one changes nothing.

        Raises:
            UserError: another process writes, or a file cannot grow.
        """
        if capacity <= self.capacity:
            return
        self.claim()
        header = replace(self._header, capacity=capacity)
        for name, (shape, _) in header.arrays().items():
            Column.extend(self.path, name, shape[0])
        # Last: until then the replay is the smaller one, whose rows are where they were.
        header.write(self.path)
        self._header = header
        self._columns = {n: Column(self.path, n, spec) for n, spec in header.arrays().items()}

    def flush(self) -> None:
        """Force everything written to the disk itself: survives a power cut, not just a kill."""
        for column in self._columns.values():
            column.sync()
        for header in self.path.glob("*.json"):
            sync(header)
        sync(self.path)

    def close(self) -> None:
        """Give up the lock on writing. Reading goes on working."""
        self._lock.release()

    def sampler(
        self,
        *,
        chunk_length: int,
        discount: float,
        short_chunks: ShortChunks,
        reward: RewardSpec,
        sources: Collection[str] | None = None,
    ) -> ChunkSampler:
        """A sampler of chunks of H = `chunk_length` steps.

        Args:
            chunk_length: H.
            discount: γ per step, in (0, 1].
            short_chunks: "drop" keeps to chunks wholly inside their episode; one may end exactly at
                the episode's end. "pad" adds chunks cut short by *termination*: their tail repeats
                the last action and is not `valid`, and as the chunk terminates the tail cannot
                matter. Chunks cut short by *truncation* are always dropped: s_{t+H} does not exist.
            reward: what to make of the stored reward.
            sources: draw only from episodes of these sources; None draws from all.

        Raises:
            UserError: an argument is outside its range, or the stored reward does not fit `reward`.
        """
        return ChunkSampler(
            self,
            VectorObserver(self),
            chunk_length=chunk_length,
            discount=discount,
            short_chunks=short_chunks,
            reward=reward,
            sources=sources,
        )

    def returns_to_go(self, discount: float, reward: RewardSpec) -> np.ndarray:
        """Exact Monte-Carlo return of every step, (num_steps,) float64.

        G_t = sum over i of γ^i r_{t+i} up to the end of the episode; NaN in episodes that did not
        terminate, whose return is unknown.
        """
        returns = reward.apply(self.rewards).astype(np.float64)
        episodes = self.episodes()
        remaining = np.concatenate(
            [np.arange(n, 0, -1) for n in episodes.num_steps] or [np.empty(0, np.int64)]
        )
        window = 1  # `returns` holds the sum over this many steps; each pass doubles it
        while window < (episodes.num_steps.max() if len(episodes) else 0):
            reaches = np.flatnonzero(remaining > window)
            returns[reaches] = returns[reaches] + discount**window * returns[reaches + window]
            window *= 2
        returns[np.repeat(~episodes.terminated, episodes.num_steps)] = np.nan
        return returns

    def _replace_header(self, num_episodes: int, num_steps: int, sources: tuple[str, ...]) -> None:
        header = replace(
            self._header, num_episodes=num_episodes, num_steps=num_steps, sources=sources
        )
        header.write(self.path)
        self._header = header

    def claim(self) -> None:
        """Take the lock on writing, until `close`.

        Raises:
            UserError: another process has it, or has written since this buffer was opened.
        """
        if self._lock.held:
            return
        self._lock.acquire()
        if Header.read(self.path) != self._header:
            self._lock.release()
            raise UserError(
                f"Another process has written to the replay {self.path} since it was opened here: "
                "open it again."
            )

    def _check_episode(self, arrays: dict[str, np.ndarray], *, ended: bool) -> None:
        where = f"Episode {self.num_episodes} of the replay {self.path}"
        num_steps = len(arrays["actions"])
        expected = {
            "observations": (num_steps + 1, self.observation_dim),
            "actions": (num_steps, self.action_dim),
            "rewards": (num_steps,),
        }
        if num_steps == 0:
            raise UserError(f"{where} has no step.")
        for name, array in arrays.items():
            if array.shape != expected[name]:
                raise UserError(f"{where} has {name} of {array.shape}, not {expected[name]}.")
            if not np.isfinite(array).all():
                raise UserError(f"{where} has a NaN or infinite number in its {name}.")
        if not ended:
            raise UserError(f"{where} is neither terminated nor truncated: only whole ones count.")
        if self.num_steps + num_steps > self.capacity:
            raise UserError(
                f"The replay {self.path} is full: it holds {self.num_steps} of {self.capacity} "
                f"steps and {num_steps} more do not fit. Create it with a larger capacity."
            )

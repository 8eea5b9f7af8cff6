"""Episodes in a folder: memory-mapped arrays and a JSON header, nothing pickled.

Layout of the folder (arrays are ordinary `.npy`, allocated sparsely for the whole capacity):

    replay.json        format, sizes, how many episodes and steps count, names of the sources
    observations.npy   float32, T + 1 rows an episode: the state after the last step is kept
    actions.npy        float32, one row a step
    rewards.npy        float32, one number a step, as the environment gave it
    episodes.npy       int64, one row an episode: see `Episodes`
    column.<name>.npy  a further column, one entry a step

and, where a policy looks through cameras or is told a task, what `frame_files` lists.

An episode counts from the moment the header names it. The header is replaced atomically after the
arrays are written, so a killed process leaves either the whole episode or a tail that nobody reads
and that the next episode overwrites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.data.frame_files import FRAMES_NAME, ImageShape, limit_cache
from vla_trqam.data.frames import FrameObserver, Frames, ImageDtype, check_cameras
from vla_trqam.data.recorded import RecordedEpisodes
from vla_trqam.data.replay_files import (
    COLUMN_DTYPES,
    HEADER_NAME,
    Column,
    ColumnSpec,
    Header,
    WriteLock,
    column_array,
)
from vla_trqam.data.sampling import (
    ChunkSampler,
    Observer,
    RewardSpec,
    ShortChunks,
    VectorObserver,
)
from vla_trqam.errors import UserError
from vla_trqam.files import sync


class Replay(RecordedEpisodes):
    """Episodes in a folder, appended one by one, sampled in chunks.

    Any number of processes may read; the first one that writes locks the folder for itself until
    it closes the replay or ends.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Use `create` or `open`."""
        super().__init__(path, header)
        self._lock = WriteLock(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        observation_dim: int,
        action_dim: int,
        capacity: int,
        cameras: Mapping[str, ImageShape] | None = None,
        frame_capacity: int | None = None,
        tasks_of_rows: bool = False,
        columns: Mapping[str, ColumnSpec] | None = None,
        lent_frames: int = 0,
    ) -> Replay:
        """Make an empty replay in the folder `path`, which must not hold one yet.

        Args:
            path: folder, made if absent.
            observation_dim: O.
            action_dim: A.
            capacity: largest number of steps. Disk space is taken only as episodes come.
            cameras: name -> (height, width, channels); names without the `observation.images.`.
                None for a replay of states alone, which keeps no tasks either.
            frame_capacity: largest number of frames; twice the steps if None, which always fits.
            tasks_of_rows: room for tasks that change within an episode.
            columns: further ones: name -> dtype and shape of one step's entry.
            lent_frames: of the first so many frames no copy is made; see `borrow`.

        Raises:
            UserError: a size is not positive, a name cannot be a file's, or the folder already
                holds a replay.
        """
        folder = Path(path)
        sizes = {"observation_dim": observation_dim, "action_dim": action_dim, "capacity": capacity}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"The replay's {name} is {value}; it must be at least 1.")
        header = Header(observation_dim, action_dim, capacity, columns=dict(columns or {}))
        _check_columns(header.columns)
        room = 2 * capacity if frame_capacity is None else frame_capacity
        frames = (
            None
            if cameras is None
            else Frames.described(
                cameras, room, capacity, tasks_of_rows=tasks_of_rows, lent_frames=lent_frames
            )
        )
        if (folder / HEADER_NAME).exists():
            raise UserError(f"{folder} already holds a replay: open it or name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FRAMES_NAME).unlink(missing_ok=True)  # of one that was killed as it was made
        if frames is not None:
            Frames.allocate(folder, frames)
        for name, spec in header.arrays().items():
            Column.allocate(folder, name, spec)
        # Last, because the folder is a replay from the moment that this header stands.
        header.write(folder)
        return cls(folder, header)

    @classmethod
    def open(cls, path: str | Path) -> Replay:
        """Open the replay in the folder `path` for reading and appending.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return cls(Path(path), Header.read(Path(path)))

    def add(self, episode: Episode, *, source: str) -> None:
        """Append one whole episode; it counts as soon as this returns.

        Actions are in the environment's units or in the policy's normalised space, as the run's
        policy wants them. A column of the replay that the episode lacks is 0 (False) in its steps.

        Args:
            episode: see `Episode`. Its task is kept where the replay keeps any.
            source: where it comes from, such as "dataset" or "online".

        Raises:
            UserError: shapes or types disagree, a number is not finite, the episode has no end or
                no step, the replay is full, or another process writes to it.
        """
        where = f"Episode {self.num_episodes} of the replay {self.path}"
        self._check_frames(episode, where)
        self._check_steps(episode, where)
        self.claim()
        header, num_steps, num_rows = self._header, episode.num_steps, self._num_rows
        if self._frames is not None:
            self._frames.write(
                episode,
                number=header.num_episodes,
                first_row=num_rows,
                first_frame=self.num_frames,
            )
        sources = header.sources if source in header.sources else (*header.sources, source)
        flags = (
            episode.terminated,
            episode.truncated,
            episode.success,
            sources.index(source),
        )
        row = np.array([header.num_steps, num_steps, *flags], dtype=np.int64)
        self._columns["observations"].write(num_rows, episode.observations)
        self._columns["actions"].write(header.num_steps, episode.actions)
        self._columns["rewards"].write(header.num_steps, episode.rewards)
        for name, (_, shape) in header.columns.items():
            values = episode.columns.get(name, np.zeros((num_steps, *shape)))
            self._columns[column_array(name)].write(header.num_steps, values)
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
        if self._frames is not None:
            limit_cache(self.path, self._frames.index(num_steps + num_episodes).num_frames)
        self._replace_header(num_episodes, num_steps, self._header.sources)
        self.revision += 1

    def grow(self, capacity: int, frame_capacity: int = 0) -> None:
        """Make room for more; numbers below the present ones change nothing.

        Caches that were made before do not know of it.

        Args:
            capacity: largest number of steps.
            frame_capacity: largest number of frames.

        Raises:
            UserError: another process writes, or a file cannot grow.
        """
        header = replace(self._header, capacity=max(capacity, self.capacity))
        if self._frames is not None:
            self._grow_frames(self._frames, max(frame_capacity, self.frame_capacity), header)
        if header == self._header:
            return
        self.claim()
        for name, (shape, _) in header.arrays().items():
            Column.extend(self.path, name, shape[0])
        # Last: until then the replay is the smaller one, whose rows are where they were.
        header.write(self.path)
        self._header = header
        self._columns = {n: Column(self.path, n, spec) for n, spec in header.arrays().items()}

    def _grow_frames(self, frames: Frames, frame_capacity: int, header: Header) -> None:
        larger = replace(
            frames.header, frame_capacity=frame_capacity, step_capacity=header.capacity
        )
        if header != self._header or frame_capacity != frames.header.frame_capacity:
            self.claim()
            frames.extend(larger)

    def flush(self) -> None:
        """Force everything written to the disk itself: survives a power cut, not just a kill."""
        if self._frames is not None:
            self._frames.sync()
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
        flow_length: int | None = None,
        sources: Collection[str] | None = None,
        image_dtype: ImageDtype = "float32",
        observer: Observer[Any] | None = None,
        next_observer: Observer[Any] | None = None,
        repeats: Mapping[str, int] | None = None,
    ) -> ChunkSampler[Any]:
        """A sampler of chunks of n = `chunk_length` steps.

        Its observations are the states, or images, state and task in LeRobot's format where the
        replay has frames: a chunk then begins only where one was taken, and ends where one was
        unless it terminates.

        Args:
            chunk_length: n, the steps of a chunk that are executed before the next is asked for.
            discount: γ per step, in (0, 1].
            short_chunks: "drop" keeps to chunks wholly inside their episode; one may end exactly at
                the episode's end. "pad" adds chunks cut short by *termination*: their tail repeats
                the last action and is not `valid`, and as the chunk terminates the tail cannot
                matter. Chunks cut short by *truncation* are always dropped: s_{t+n} does not exist.
            reward: what to make of the stored reward.
            flow_length: H >= n, the actions that a batch holds of a chunk: what was done in the
                n steps and after them, the context of a flow over H actions. None for n.
            sources: draw only from episodes of these sources; None draws from all.
            image_dtype: see `observation_at`.
            observer: what the batch's observations are instead, such as a `FeatureCache`.
            next_observer: what its next observations are; None for the same.
            repeats: column of the replay -> how many times as often a chunk is drawn that has it
                true (not 0) in a step.

        Raises:
            UserError: an argument is outside its range, or the stored reward does not fit `reward`.
        """
        if observer is None:
            seen = self._frames is not None
            observer = FrameObserver(self, image_dtype) if seen else VectorObserver(self)
        return ChunkSampler(
            self,
            observer,
            chunk_length=chunk_length,
            flow_length=flow_length,
            next_observer=next_observer,
            discount=discount,
            short_chunks=short_chunks,
            reward=reward,
            sources=sources,
            repeats=repeats,
        )

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

    def _check_frames(self, episode: Episode, where: str) -> None:
        if self._frames is None:
            check_cameras(where, episode.images, {})
        else:
            self._frames.check(episode, where, self.num_frames)

    def _check_steps(self, episode: Episode, where: str) -> None:
        num_steps = episode.num_steps
        if num_steps == 0:
            raise UserError(f"{where} has no step.")
        self._check_arrays(episode, where)
        if not (episode.terminated or episode.truncated):
            raise UserError(f"{where} is neither terminated nor truncated: only whole ones count.")
        if self.num_steps + num_steps > self.capacity:
            raise UserError(
                f"The replay {self.path} is full: it holds {self.num_steps} of {self.capacity} "
                f"steps and {num_steps} more do not fit. Create it with a larger capacity."
            )

    def _check_arrays(self, episode: Episode, where: str) -> None:
        num_steps, columns = episode.num_steps, self._header.columns
        expected: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
            "observations": (episode.observations, (num_steps + 1, self.observation_dim)),
            "actions": (episode.actions, (num_steps, self.action_dim)),
            "rewards": (episode.rewards, (num_steps,)),
        }
        for name, values in episode.columns.items():
            if name not in columns:
                known = ", ".join(columns) or "none"
                raise UserError(f"{where} has the column {name!r}; the replay has {known}.")
            expected[name] = values, (num_steps, *columns[name][1])
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise UserError(f"{where} has {name} of {array.shape}, not {shape}.")
            if not np.isfinite(array).all():
                raise UserError(f"{where} has a NaN or infinite number in its {name}.")


def _check_columns(columns: Mapping[str, ColumnSpec]) -> None:
    for name, (dtype, shape) in columns.items():
        if "/" in name:
            raise UserError(f"The column name {name!r} holds a '/', which files cannot bear.")
        if dtype not in COLUMN_DTYPES:
            known = ", ".join(COLUMN_DTYPES)
            raise UserError(f"The replay's column {name} is {dtype}; it can be one of {known}.")
        if min(shape, default=1) < 1:
            raise UserError(f"The replay's column {name} is {shape}; sizes must be at least 1.")

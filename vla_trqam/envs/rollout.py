"""Episodes from several simulator processes; an episode is a function of its seed and the policy.

A process that dies or hangs is therefore replaced, and its episode played again from the start: the
numbers are the same.

Each worker gets its next chunk on its own. A lock-step vector environment makes every worker wait
for the slowest one and for the others' resets, and its policy sees batches whose size, and so whose
rounding, depends on the number of workers.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import wait
from typing import Any, Self

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.pool_worker import Deadlines, LostWorkerError, Worker
from vla_trqam.envs.worker import FrameSettings, WorkerSettings
from vla_trqam.errors import UserError

ChunkPolicy = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
"""(observations, episode seeds (N,) int64, chunk indices (N,) int64) -> (N, H, A).

Observations are (N, O) float32; with cameras `{"agent_pos": (N, O) float32, "pixels": {name:
(N, height, width, 3) uint8}, "task": N texts}`, as LeRobot's environments have it.

The seed and the index let a policy draw the same noise for the same chunk of the same episode."""


@dataclass
class _Unfinished:
    """An episode under way, or about to begin."""

    position: int
    seed: int
    losses: int = 0
    task: str = ""
    chunks: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, np.ndarray]] = field(default_factory=list)

    def lost(self) -> _Unfinished:
        """The same from its start, after its process was lost once more."""
        return _Unfinished(self.position, self.seed, self.losses + 1)

    def finish(
        self, observation: np.ndarray, terminated: bool, truncated: bool, chunk_length: int
    ) -> Episode:
        """The whole episode, given what its last chunk led to."""

        def joined(key: str) -> np.ndarray:
            return np.concatenate([chunk[key][: chunk["num_steps"]] for chunk in self.chunks])

        last, actions = self.chunks[-1], joined("chunk_actions")
        looked = where_cameras_look(len(actions), chunk_length, terminated)
        return Episode(
            observations=np.vstack([joined("chunk_observations"), observation[None]]),
            actions=actions,
            rewards=joined("chunk_rewards"),
            terminated=terminated,
            truncated=truncated,
            success=last["is_success"],
            seed=self.seed,
            task=self.task,
            frames=np.stack(last["frames"]) if last["frames"] else None,
            images={n: np.stack([seen[n] for seen in self.images]) for n in self.images[0]},
            observed=looked if self.images[0] else None,
        )


_Crew = list[Worker[_Unfinished]]


class _Schedule:
    """Hands seeds to workers, chunks to episodes, and finished episodes on in order."""

    def __init__(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        chunk_length: int,
        frames: FrameSettings | None,
        on_episode: Callable[[Episode], None] | None,
    ) -> None:
        self._policy, self._chunk_length = policy, chunk_length
        self._frames = frames
        self._on_episode = on_episode
        self._waiting = deque(_Unfinished(i, int(seed)) for i, seed in enumerate(seeds))
        self._finished: dict[int, Episode] = {}
        self._delivered: list[Episode] = []

    def run(self, workers: _Crew) -> list[Episode]:
        """Plays all episodes; workers that are lost are replaced in the list."""
        for number in range(len(workers)):
            self._attend(workers, number, self._assign)
        while busy := {w.connection: i for i, w in enumerate(workers) if w.job is not None}:
            left = min(workers[number].seconds_left for number in busy.values())
            ready = wait(list(busy), timeout=left)
            for connection, number in busy.items():
                work = self._handle if connection in ready else Worker.check_deadline
                self._attend(workers, number, work)
        return self._delivered

    def _attend(
        self, workers: _Crew, number: int, work: Callable[[Worker[_Unfinished]], None]
    ) -> None:
        """Does the work; a worker that is lost over it gets a successor with the same episode."""
        worker = workers[number]
        try:
            work(worker)
        except LostWorkerError as loss:
            episode = worker.job
            assert episode is not None
            chunk = f"at chunk {len(episode.chunks)} of"
            at = {"make": "at its start for", "reset": "at the reset of"}.get(worker.request, chunk)
            worker.job = episode.lost()
            doing = f"{at} the episode of seed {episode.seed}"
            workers[number] = worker.replaced(loss, doing, worker.job.losses)

    def _assign(self, worker: Worker[_Unfinished]) -> None:
        worker.job = self._waiting.popleft() if self._waiting else None
        self._begin(worker)

    def _begin(self, worker: Worker[_Unfinished]) -> None:
        """The reset, where the worker has an episode; one that is starting gets it later."""
        if worker.job is not None and worker.spaces is not None:
            worker.ask("reset", worker.job.seed, self._frames)

    def _handle(self, worker: Worker[_Unfinished]) -> None:
        kind, *reply = worker.receive()
        if kind == "spaces":
            self._begin(worker)
            return
        observation, images, *rest = reply
        episode = worker.job
        assert episode is not None
        if images or kind == "observation":
            episode.images.append(images)
        ended = False
        if kind == "chunk":
            terminated, truncated, info = rest
            episode.chunks.append(info)
            ended = terminated or truncated
        else:
            (episode.task,) = rest
        if not ended:
            worker.ask("chunk", self._chunk(observation, images, worker))
            return
        try:
            self._assign(worker)  # before the bookkeeping, so that the worker does not wait for it
        finally:  # lost over its next episode, the worker has played this one
            end = observation, terminated, truncated, self._chunk_length
            self._deliver(episode.position, episode.finish(*end))

    def _chunk(
        self,
        observation: np.ndarray,
        images: dict[str, np.ndarray],
        worker: Worker[_Unfinished],
    ) -> np.ndarray:
        episode, spaces = worker.job, worker.spaces
        assert episode is not None
        assert spaces is not None
        wanted = 1, self._chunk_length, spaces[1]
        seed, index = np.array([episode.seed]), np.array([len(episode.chunks)])
        state = observation[None]
        seen = state if not images else _seen(state, images, episode.task)
        chunk = np.asarray(self._policy(seen, seed, index), dtype=np.float32)
        if chunk.shape != wanted or not np.isfinite(chunk).all():
            raise ValueError(
                f"the policy returned {chunk.shape} for episode seed {episode.seed}; it must be "
                f"{wanted} finite numbers"
            )
        return chunk[0]

    def _deliver(self, position: int, episode: Episode) -> None:
        self._finished[position] = episode
        while len(self._delivered) in self._finished:
            self._delivered.append(self._finished.pop(len(self._delivered)))
            if self._on_episode is not None:
                self._on_episode(self._delivered[-1])


def where_cameras_look(num_steps: int, chunk_length: int, terminated: bool) -> np.ndarray:
    """(T + 1,) bool: where the policy decides, and where the limit cuts."""
    looked = np.arange(num_steps + 1) % chunk_length == 0
    looked[-1] = not terminated
    return looked


def _seen(state: np.ndarray, images: dict[str, np.ndarray], task: str) -> dict[str, Any]:
    return {
        "agent_pos": state,
        "pixels": {name: image[None] for name, image in images.items()},
        "task": [task],
    }


class RolloutPool:
    """Runs episodes of a family in worker processes.

    Workers start (imports, model, compiled code) while the constructor has long returned; the first
    `run` waits for them. They ignore the terminal's Ctrl-C and end with the trainer, whatever ends
    it. Use as a context manager, or `close`.
    """

    def __init__(
        self,
        family: EnvFamily,
        *,
        chunk_length: int,
        num_workers: int,
        chunk_deadline: float = 120.0,
    ) -> None:
        """Start the workers.

        Args:
            family: what is played.
            chunk_length: H, actions per call of the policy; cameras look where it decides.
            num_workers: processes; one per core is best.
            chunk_deadline: seconds for the steps of one chunk, after which the process counts as
                hanging.

        Raises:
            UserError: a number below 1, or a deadline that is not positive.
        """
        for name, number in {"chunk_length": chunk_length, "num_workers": num_workers}.items():
            if number < 1:
                raise UserError(f"{name} is {number}; it must be at least 1.")
        self.family = family
        self._deadlines = Deadlines(chunk_deadline)
        self._num_workers = num_workers
        self._settings = WorkerSettings(
            family.make,
            rendering=False,
            chunk_length=chunk_length,
            cameras=tuple(family.cameras),
        )
        self._workers = self._start(num_workers)
        self._recorders: _Crew = []

    @property
    def observation_size(self) -> int:
        """O; waits for the workers' start."""
        return self._spaces()[0]

    @property
    def action_size(self) -> int:
        """A; waits for the workers' start."""
        return self._spaces()[1]

    def _spaces(self) -> tuple[int, int]:
        for losses in count(1):
            try:
                return self._workers[0].await_start()
            except LostWorkerError as loss:
                self._workers[0] = self._workers[0].replaced(loss, "at its start", losses)
        raise AssertionError("unreachable")

    def run(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        *,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> list[Episode]:
        """One episode per seed, in the order of `seeds`.

        The policy is asked for one chunk at a time (N = 1), so that an episode's numbers depend on
        neither the number of workers nor the other episodes.

        Args:
            policy: see `ChunkPolicy`; its actions are clipped to the limits when executed.
            seeds: of the initial states.
            on_episode: called in the order of `seeds`, as soon as all earlier ones are done.

        Raises:
            UserError: the task cannot be made as asked, or the processes that play one of the
                episodes die or hang again and again; once or twice, they are replaced.
            ValueError: the policy returns something other than finite (1, H, A) numbers.
            RuntimeError: a worker failed; its traceback is in the message.
        """
        try:
            return self._run(self._workers, policy, seeds, None, on_episode)
        except BaseException:
            # Replies may be under way: only fresh workers can serve another call.
            self.close()
            raise

    def record(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        *,
        height: int = 256,
        width: int = 256,
        every: int = 2,
    ) -> list[Episode]:
        """As `run`, with `frames` of `height` by `width` pixels at `every` so many steps.

        Numbers are the same, but a software-rendered frame is slow.

        Raises:
            UserError: a size below 1, or off-screen rendering does not start. Others: see `run`.
        """
        if min(height, width, every) < 1:
            raise UserError(f"height {height}, width {width}, every {every} must be at least 1.")
        frames = FrameSettings(every=every, height=height, width=width)
        if not self._recorders:
            self._recorders = self._start(min(self._num_workers, len(seeds)), rendering=True)
        try:
            return self._run(self._recorders, policy, seeds, frames, None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; a second call does nothing. A closed pool runs nothing more."""
        for worker in (*self._workers, *self._recorders):
            worker.stop()
        self._workers, self._recorders = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, number: int, *, rendering: bool = False) -> _Crew:
        settings = dataclasses.replace(self._settings, rendering=rendering)
        return [Worker(settings, self._deadlines) for _ in range(number)]

    def _run(
        self,
        workers: _Crew,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        frames: FrameSettings | None,
        on_episode: Callable[[Episode], None] | None,
    ) -> list[Episode]:
        if not seeds:
            return []
        if not workers:
            raise RuntimeError("this RolloutPool is closed")
        length = self._settings.chunk_length
        return _Schedule(policy, seeds, length, frames, on_episode).run(workers)

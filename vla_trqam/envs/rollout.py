"""Episodes from several simulator processes; an episode is a function of its seed and the policy.

Each worker gets its next chunk on its own. A lock-step vector environment (`make_vector_env`) makes
every worker wait for the slowest one and for the others' resets, and its policy sees batches whose
size, and so whose rounding, depends on the number of workers.
"""

import dataclasses
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import numpy as np

from vla_trqam.envs.env_meta import LOW_DIM_KEYS, TASK_DESCRIPTIONS, check_env_meta
from vla_trqam.envs.robomimic_images import CameraSettings
from vla_trqam.envs.worker import EnvSettings, FrameSettings
from vla_trqam.errors import UserError

ChunkPolicy = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
"""(observations, episode seeds (N,) int64, chunk indices (N,) int64) -> (N, H, A).

Observations are (N, O) float32; with cameras `{"agent_pos": (N, O) float32, "pixels": {name:
(N, height, width, 3) uint8}, "task": N texts}`, as LeRobot's environments have it.

The seed and the index let a policy draw the same noise for the same chunk of the same episode."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclass(frozen=True)
class Episode:
    """One episode of T control steps.

    Attributes:
        observations: (T + 1, O) float32; the last row is what the last action led to.
        actions: (T, A) float32 as executed, within [-1, 1].
        rewards: (T,) float32: 1 on the step that succeeds, else 0.
        terminated: the episode ended by itself (success), so nothing is bootstrapped.
        truncated: the episode was cut at the step limit.
        success: whether the task was solved.
        seed: of the initial state.
        frames: (F, height, width, 3) uint8 when recorded: first, every n-th, and last step.
        images: with cameras, what they saw where the policy decided, and where the limit cut:
            name -> (D, height, width, 3) uint8.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    success: bool
    seed: int
    frames: np.ndarray | None = None
    images: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.actions)


@dataclass
class _Unfinished:
    """An episode under way."""

    position: int
    seed: int
    chunks: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, np.ndarray]] = field(default_factory=list)

    def finish(self, observation: np.ndarray, terminated: bool, truncated: bool) -> Episode:
        """The whole episode, given what its last chunk led to."""

        def joined(key: str) -> np.ndarray:
            return np.concatenate([chunk[key][: chunk["num_steps"]] for chunk in self.chunks])

        last = self.chunks[-1]
        return Episode(
            observations=np.vstack([joined("chunk_observations"), observation[None]]),
            actions=joined("chunk_actions"),
            rewards=joined("chunk_rewards"),
            terminated=terminated,
            truncated=truncated,
            success=last["is_success"],
            seed=self.seed,
            frames=np.stack(last["frames"]) if last["frames"] else None,
            images={n: np.stack([seen[n] for seen in self.images]) for n in self.images[0]},
        )


class _Worker:
    """One process and the connection to it."""

    def __init__(self, settings: EnvSettings) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vla_trqam.envs.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict.fromkeys(_THREAD_VARIABLES, "1"),
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
            )
        self.connection = Connection(ours.detach())
        self.episode: _Unfinished | None = None
        self.spaces: tuple[int, int] | None = None
        self.connection.send(("make", settings))

    def await_start(self) -> tuple[int, int]:
        """Observation size O and action size A, once the environment is made."""
        if self.spaces is None:
            _, observation_size, action_size = self.receive()
            self.spaces = observation_size, action_size
        return self.spaces

    def receive(self) -> tuple[Any, ...]:
        """The next reply; failures over there are raised here."""
        try:
            reply: tuple[Any, ...] = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.wait()
            raise RuntimeError(f"a simulator process ended with exit code {code}") from error
        if reply[0] == "user_error":
            raise UserError(reply[1])
        if reply[0] == "error":
            raise RuntimeError(f"a simulator process failed:\n{reply[1]}")
        return reply

    def stop(self) -> None:
        """End the process at once; it holds nothing that needs saving."""
        self.connection.close()
        self._process.kill()
        self._process.wait()


class _Schedule:
    """Hands seeds to workers, chunks to episodes, and finished episodes on in order."""

    def __init__(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        chunk_shape: tuple[int, int],
        task: str,
        frames: FrameSettings | None,
        on_episode: Callable[[Episode], None] | None,
    ) -> None:
        self._policy, self._task = policy, task
        self._chunk_shape = chunk_shape
        self._frames = frames
        self._on_episode = on_episode
        self._waiting = deque(_Unfinished(i, int(seed)) for i, seed in enumerate(seeds))
        self._finished: dict[int, Episode] = {}
        self._delivered: list[Episode] = []

    def run(self, workers: Sequence[_Worker]) -> list[Episode]:
        for worker in workers:
            self._assign(worker)
        while busy := {w.connection: w for w in workers if w.episode is not None}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                self._handle(busy[connection])
        return self._delivered

    def _assign(self, worker: _Worker) -> None:
        worker.episode = self._waiting.popleft() if self._waiting else None
        if worker.episode is not None:
            worker.connection.send(("reset", worker.episode.seed, self._frames))

    def _handle(self, worker: _Worker) -> None:
        kind, observation, images, *rest = worker.receive()
        episode = worker.episode
        assert episode is not None
        if images or kind == "observation":
            episode.images.append(images)
        ended = False
        if kind == "chunk":
            terminated, truncated, info = rest
            episode.chunks.append(info)
            ended = terminated or truncated
        if not ended:
            worker.connection.send(("chunk", self._chunk(observation, images, episode)))
            return
        self._assign(worker)  # before the bookkeeping, so that the worker does not wait for it
        self._deliver(episode.position, episode.finish(observation, terminated, truncated))

    def _chunk(
        self, observation: np.ndarray, images: dict[str, np.ndarray], episode: _Unfinished
    ) -> np.ndarray:
        seed, index = np.array([episode.seed]), np.array([len(episode.chunks)])
        state = observation[None]
        seen = state if not images else self._seen(state, images)
        chunk = np.asarray(self._policy(seen, seed, index), dtype=np.float32)
        if chunk.shape != (1, *self._chunk_shape) or not np.isfinite(chunk).all():
            raise ValueError(
                f"the policy returned {chunk.shape} for episode seed {episode.seed}; it must be "
                f"{(1, *self._chunk_shape)} finite numbers"
            )
        return chunk[0]

    def _seen(self, state: np.ndarray, images: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "agent_pos": state,
            "pixels": {name: image[None] for name, image in images.items()},
            "task": [self._task],
        }

    def _deliver(self, position: int, episode: Episode) -> None:
        self._finished[position] = episode
        while len(self._delivered) in self._finished:
            self._delivered.append(self._finished.pop(len(self._delivered)))
            if self._on_episode is not None:
                self._on_episode(self._delivered[-1])


class RolloutPool:
    """Runs episodes of one task in worker processes.

    Workers start (imports, model, compiled code) while the constructor has long returned; the first
    `run` waits for them. They ignore the terminal's Ctrl-C and end with the trainer, whatever ends
    it. Use as a context manager, or `close`.
    """

    def __init__(
        self,
        env_meta: Mapping[str, Any],
        *,
        chunk_length: int,
        num_workers: int,
        max_episode_steps: int,
        obs_keys: Sequence[str] = LOW_DIM_KEYS,
        fast_step: bool = True,
        cameras: CameraSettings | None = None,
    ) -> None:
        """Start the workers.

        Args:
            env_meta: a file's `env_args`, see `robomimic.env_meta_for`.
            chunk_length: H, actions per call of the policy.
            num_workers: processes; one per core is best.
            max_episode_steps: control steps after which an episode is truncated.
            obs_keys: observation keys, in the order of concatenation.
            fast_step: see `RobomimicEnv`.
            cameras: what the policy sees beside `obs_keys`, rendered where it decides.

        Raises:
            UserError: a number below 1, or `env_meta` cannot be honoured.
        """
        numbers = {
            "chunk_length": chunk_length,
            "num_workers": num_workers,
            "max_episode_steps": max_episode_steps,
        }
        for name, number in numbers.items():
            if number < 1:
                raise UserError(f"{name} is {number}; it must be at least 1.")
        check_env_meta(env_meta)
        self._num_workers = num_workers
        self._settings = EnvSettings(
            env_meta=dict(env_meta),
            chunk_length=chunk_length,
            max_episode_steps=max_episode_steps,
            obs_keys=tuple(obs_keys),
            fast_step=fast_step,
            render_offscreen=False,
            cameras=cameras,
        )
        name = str(env_meta["env_name"])
        self.task_description = TASK_DESCRIPTIONS.get(name, name)
        self._workers = self._start(num_workers)
        self._recorders: list[_Worker] = []

    @property
    def observation_size(self) -> int:
        """O; waits for the workers' start."""
        return self._workers[0].await_start()[0]

    @property
    def action_size(self) -> int:
        """A; waits for the workers' start."""
        return self._workers[0].await_start()[1]

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
            policy: see `ChunkPolicy`; its actions are clipped to [-1, 1] when executed.
            seeds: of the initial states.
            on_episode: called in the order of `seeds`, as soon as all earlier ones are done.

        Raises:
            UserError: the task cannot be made as asked.
            ValueError: the policy returns something other than finite (1, H, A) numbers.
            RuntimeError: a worker died or failed; its traceback is in the message.
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
        """As `run`, with `frames`; numbers are the same, but a software-rendered frame is slow.

        Args:
            policy: see `run`.
            seeds: see `run`.
            height: of the frames in pixels.
            width: of the frames in pixels.
            every: steps from frame to frame.

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

    def _start(self, count: int, *, rendering: bool = False) -> list[_Worker]:
        settings = dataclasses.replace(self._settings, render_offscreen=rendering)
        return [_Worker(settings) for _ in range(count)]

    def _run(
        self,
        workers: Sequence[_Worker],
        policy: ChunkPolicy,
        seeds: Sequence[int],
        frames: FrameSettings | None,
        on_episode: Callable[[Episode], None] | None,
    ) -> list[Episode]:
        if not seeds:
            return []
        if not workers:
            raise RuntimeError("this RolloutPool is closed")
        action_sizes = [worker.await_start()[1] for worker in workers]
        chunk_shape = (self._settings.chunk_length, action_sizes[0])
        schedule = _Schedule(policy, seeds, chunk_shape, self.task_description, frames, on_episode)
        return schedule.run(workers)

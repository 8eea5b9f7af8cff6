"""The process that runs one environment for a `RolloutPool`: `python -m vla_trqam.envs.worker FD`.

A program of its own rather than a `multiprocessing` child: it does not import the recipe's main
module again (torch, LeRobot: seconds and gigabytes per worker), and it leads its own session, so
that Ctrl-C reaches the trainer alone. It ends when its connection closes, however the trainer died.

Requests are tuples, answered in order:
    ("make", settings)                  -> ("spaces", O, A)
    ("reset", seed, frames or None)     -> ("observation", (O,), images, task)
    ("chunk", (H, A))                   -> ("chunk", (O,), images, terminated, truncated, info)
`images` is what the family's cameras see then, {} without cameras and after a termination, when
nobody looks; `task` is what the policy is told. An episode's last info also holds its `frames`.
Anything that fails is answered by ("user_error", message) or ("error", traceback).
"""

import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from vla_trqam.envs.base import MakeEnv, TaskEnv
from vla_trqam.envs.chunked import ChunkEnv
from vla_trqam.errors import UserError


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs: a family's `make`, whether to film, H, and the cameras to hand on."""

    make: MakeEnv
    rendering: bool
    chunk_length: int
    cameras: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameSettings:
    """Frames to take of an episode: every n-th step, `height` x `width` pixels."""

    every: int
    height: int
    width: int


class FrameRecorder(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Keeps the frames of an episode: the first, every n-th, and the last."""

    def __init__(self, env: TaskEnv) -> None:
        """Wrap an environment; nothing is rendered before `configure`."""
        super().__init__(env)
        self._task_env = env
        self._settings: FrameSettings | None = None
        self._steps = 0
        self.frames: list[np.ndarray] = []

    def configure(self, settings: FrameSettings | None) -> None:
        """What to record from the next reset on."""
        self._settings = settings

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset and take the first frame."""
        result = self.env.reset(**kwargs)
        self._steps = 0
        self.frames = []
        if self._settings:
            self._take(self._settings)
        return result

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Step and take a frame when one is due."""
        result = self.env.step(action)
        self._steps += 1
        ended = result[2] or result[3]
        if self._settings and (ended or self._steps % self._settings.every == 0):
            self._take(self._settings)
        return result

    def _take(self, settings: FrameSettings) -> None:
        self.frames.append(self._task_env.frame(settings.height, settings.width))


class EnvServer:
    """Answers a pool's requests with one environment."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Make the environment; errors are its own."""
        env = self._task_env = settings.make(settings.rendering)
        self._cameras = settings.cameras
        self._recorder = FrameRecorder(env)
        self._env = ChunkEnv(self._recorder, settings.chunk_length)
        assert isinstance(env.action_space, gymnasium.spaces.Box)
        # The first step loads compiled code; do it while the trainer is still busy elsewhere.
        observation, _ = env.reset(seed=0)
        env.step(np.clip(0.0, env.action_space.low, env.action_space.high))
        self.spaces = ("spaces", len(observation), env.action_space.shape[0])

    def answer(self, request: tuple[Any, ...]) -> tuple[Any, ...]:
        """One request's reply, see the module's documentation."""
        kind, *arguments = request
        if kind == "reset":
            return self._reset(*arguments)
        assert kind == "chunk", kind
        return self._chunk(*arguments)

    def _reset(self, seed: int, frames: FrameSettings | None) -> tuple[Any, ...]:
        self._recorder.configure(frames)
        observation, _ = self._env.reset(seed=seed)
        return "observation", observation, self._look(), self._task_env.task_text

    def _chunk(self, chunk: np.ndarray) -> tuple[Any, ...]:
        observation, _, terminated, truncated, info = self._env.step(chunk)
        if terminated or truncated:
            info["frames"] = self._recorder.frames
        images = {} if terminated else self._look()
        return "chunk", observation, images, terminated, truncated, info

    def _look(self) -> dict[str, np.ndarray]:
        if not self._cameras:
            return {}
        shown = self._task_env.look()
        return {name: shown[name] for name in self._cameras}


def serve(connection: Connection) -> None:
    """Answer requests until the other side closes the connection."""
    server: EnvServer | None = None
    reply: tuple[Any, ...]
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            if server is None:
                server = EnvServer(request[1])
                reply = server.spaces
            else:
                reply = server.answer(request)
        except UserError as error:
            reply = ("user_error", str(error))
        except Exception:  # sent on: the trainer raises it with this traceback
            reply = ("error", traceback.format_exc())
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

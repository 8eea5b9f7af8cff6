"""A simulator process with a tiny task and accidents on order: `python accident_worker.py FD`.

The file that `ACCIDENTS` names holds a JSON list of {"at": "make", "reset" or a chunk's number,
"seed": ..., "kind": ..., "times": ...}; each happens so many times, counted by files beside it.
"""

import json
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from vla_trqam.envs import worker

OBSERVATION, ACTION, NUM_CHUNKS = 3, 2, 3


class TinyServer:
    """An episode of three chunks, whose numbers follow from the seed and the actions."""

    def __init__(self, settings):
        self.spaces = ("spaces", OBSERVATION, ACTION)
        self.horizon = settings.chunk_length
        suffer("make", None)

    def answer(self, request):
        kind, *arguments = request
        if kind == "reset":
            self.seed, frames = arguments
            suffer("reset", self.seed)
            self.number, self.frames = 0, frames is not None
            self.state = np.random.default_rng(self.seed).normal(size=OBSERVATION)
            return "observation", self.state.astype(np.float32), {}, "do it"
        return self.chunk(*arguments)

    def chunk(self, chunk):
        suffer(self.number, self.seed)
        self.number += 1
        seen = np.repeat(self.state[None], self.horizon, axis=0).astype(np.float32)
        self.state = np.tanh(self.state + chunk.sum() * np.arange(1, 1 + OBSERVATION))
        ended = self.number == NUM_CHUNKS
        info = {
            "chunk_observations": seen,
            "chunk_actions": np.clip(chunk, -1, 1),
            "chunk_rewards": np.zeros(self.horizon, np.float32),
            "num_steps": self.horizon,
            "is_success": False,
        }
        if ended:
            size = (1000, 1000, 3) if self.frames else (1, 1, 3)
            info["frames"] = [np.full(size, self.seed % 256, np.uint8)] if self.frames else []
        return "chunk", self.state.astype(np.float32), {}, False, ended, info


def suffer(at, seed):
    plan = Path(os.environ["ACCIDENTS"])
    for number, accident in enumerate(json.loads(plan.read_text())):
        if accident["at"] != at or accident.get("seed") not in (None, seed):
            continue
        count = plan.with_name(f"{number}.count")
        before = int(count.read_text()) if count.exists() else 0
        if before < accident["times"]:
            count.write_text(str(before + 1))
            KINDS[accident["kind"]]()


def stop_within_a_reply():
    """The connection gets the beginning of a message whose rest never comes."""
    os.write(int(sys.argv[1]), (1000).to_bytes(4, "big") + b"abc")
    os.kill(os.getpid(), signal.SIGSTOP)


KINDS = {
    "sleep": lambda: time.sleep(3600),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(7),
    "stop within a reply": stop_within_a_reply,
}

if __name__ == "__main__":
    worker.EnvServer = TinyServer
    worker.serve(Connection(int(sys.argv[1])))

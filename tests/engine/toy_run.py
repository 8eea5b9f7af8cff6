"""A run on the toy task without a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from toy_task import ToyPool, homing_policy, roll_out, toy_family

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, RewardSpec
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.engine.run import Phase, Run
from vla_trqam.methods.base import Method
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.report.metrics import MetricsLog


@contextmanager
def filled_replay(path: Path) -> Iterator[Replay]:
    """Five episodes."""
    buffer = Replay.create(path, observation_dim=3, action_dim=2, capacity=1000)
    for seed in range(5):
        episode = roll_out(homing_policy(2, 0.2), seed, 12)
        buffer.add(episode, source="dataset")
    yield buffer
    buffer.close()


def make_run(
    folder: Path, replay: Replay, learner: TRQAM, metrics: MetricsLog, **changes: Any
) -> Run:
    policy = learner.policy
    settings: dict[str, Any] = {"log_freq": 2, "save_freq": 100, "evaluation_seeds": ()} | changes
    return Run(
        output_dir=folder,
        policy=policy,
        store=EpisodeStore(replay),
        pool=ToyPool(toy_family()),
        generators=Generators.seeded(0, torch.device("cpu")),
        metrics=metrics,
        device=torch.device("cpu"),
        save_policy=policy.save_pretrained,
        **settings,
    )


def phase(
    run: Run, learner: Method, name: str = "offline", steps: int = 4, **settings: Any
) -> Phase:
    return Phase(name, steps, lambda: learner, chunks(run.store.replay), 8, **settings)


def chunks(replay: Replay) -> ChunkSampler:
    return replay.sampler(chunk_length=2, discount=0.9, short_chunks="pad", reward=RewardSpec())

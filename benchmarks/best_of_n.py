"""Does the critic know which of the base's own chunks are better?

    python benchmarks/best_of_n.py outputs/run --n 2 8
    python benchmarks/best_of_n.py outputs/run --checkpoint critic_020000

At every decision the base draws n chunks and executes the one that the critic likes best; n = 1 is
the base. Nothing is trained: what the critic's ranking gains here, inside the base's support, is
what an actor may hope for, and where the ranking loses, no actor should follow its gradient. All n
meet the same initial states, and the n chunks contain those of smaller n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from critic_uphill import FIRST_SEED, NOISE_SEED, Subject, load_subject

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.robomimic.hdf5 import read_robomimic
from vla_trqam.engine.acting import ChunkPolicy
from vla_trqam.engine.folder.checkpoints import LAST
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError
from vla_trqam.jobs.robomimic_data import dataset_path
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.formats import percent, points, points_interval, table
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

MOST = 1000


def best_of_n(subject: Subject, n: int) -> ChunkPolicy:
    """The base, asked n times a decision; the target critic's mean chooses."""
    base, critic = subject.base, subject.critic
    grid, shape = TimeGrid(base.num_flow_steps), base.chunk_shape

    @torch.no_grad()
    def act(observations: np.ndarray, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        keys = [
            (NOISE_SEED, int(seed), int(chunk)) for seed, chunk in zip(seeds, chunks, strict=True)
        ]
        noise = [np.random.default_rng(k).standard_normal((n, *shape), np.float32) for k in keys]
        observation = torch.from_numpy(np.asarray(observations, dtype=np.float32))
        context = base.encode(observation.repeat_interleave(n, dim=0))
        x_0 = torch.from_numpy(np.concatenate(noise))
        x_1 = sample_ode(lambda x, tau: base.base_velocity(x, tau, context), x_0, grid)
        q = critic.target(base.features(context), base.executed(x_1)).mean(dim=0)
        best = q.view(-1, n).argmax(dim=1)
        rows: np.ndarray = x_1.view(-1, n, *shape)[torch.arange(len(best)), best].numpy()
        return rows

    return act


def describe(results: Mapping[int, Sequence[Episode]], seeds: Sequence[int]) -> str:
    """A row for every n, against n = 1."""
    base = results[1]
    rows = []
    for n, episodes in results.items():
        paired = PairedEvaluation(
            seeds=np.asarray(seeds),
            base_success=np.array([e.success for e in base]),
            tuned_success=np.array([e.success for e in episodes]),
            base_steps=np.array([len(e.actions) for e in base]),
            tuned_steps=np.array([len(e.actions) for e in episodes]),
        )
        interval = points_interval(paired.difference_interval()) if n > 1 else ""
        gain = points(paired.difference) if n > 1 else ""
        steps = f"{paired.tuned_steps.mean():.0f}"
        rows.append([str(n), percent(paired.tuned_rate), gain, interval, steps])
    return table(["n", "success", "gain (points)", "95% interval", "mean steps"], rows)


def run_command(
    run: Path, sizes: Sequence[int], states: int, checkpoint: str, num_workers: int
) -> str:
    """Rolls every n out and returns the table."""
    subject = load_subject(run, checkpoint)
    config = subject.config
    seeds = list(range(FIRST_SEED, FIRST_SEED + states))
    family = robomimic_family(
        read_robomimic(dataset_path(config.dataset)).env_args,
        max_episode_steps=config.eval.max_episode_steps,
        obs_keys=config.dataset.obs_keys,
    )
    chunk_length = subject.base.chunk_shape[0]
    with RolloutPool(family, chunk_length=chunk_length, num_workers=num_workers) as pool:
        results = {n: pool.run(best_of_n(subject, n), seeds) for n in sorted({1, *sizes})}
    return describe(results, seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 8], help="chunks to choose from")
    parser.add_argument("--states", type=int, default=50, help="initial states")
    parser.add_argument("--checkpoint", default=LAST, help="its folder's name")
    parser.add_argument("--num_workers", type=int, default=2, help="simulator processes")
    options = parser.parse_args(arguments)
    try:
        for name, least in (("states", 2), ("num_workers", 1)):
            if not least <= getattr(options, name) <= MOST:
                raise UserError(f"--{name} must lie between {least} and {MOST}")
        if not 1 <= min(options.n) <= max(options.n) <= MOST:
            raise UserError(f"--n must lie between 1 and {MOST}")
        text = run_command(
            options.run, options.n, options.states, options.checkpoint, options.num_workers
        )
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

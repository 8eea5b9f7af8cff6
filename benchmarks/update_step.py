"""Times one TRQAM update against the matrix products that it is made of.

    python benchmarks/update_step.py

For each size it prints the seconds of one update; the floating-point work of the authors' way of
computing it (every evaluation made where it is needed, none shared); the time this machine's own
matrix product takes for that work, measured in the same run at the same shapes and threads; and the
ratio of the two times. (a) is the size of the authors' runs, (b) the default preset of
``recipes/finetune_robomimic.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes.finetune_robomimic import PRESETS

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise
from vla_trqam.training.config import parse_config
from vla_trqam.training.memory import keep_freed_memory
from vla_trqam.training.settings import FinetuneRobomimicConfig

Product = tuple[int, int, int, int]
"""(E, M, N, K): E products of (M, K) by (K, N)."""


@dataclass(frozen=True)
class Size:
    """What decides the cost of an update."""

    label: str
    observation_dim: int
    action_dim: int
    chunk_length: int
    batch_size: int
    num_flow_steps: int
    hidden_dims: tuple[int, ...]
    critic_dims: tuple[int, ...]
    ensemble_size: int
    train_base: bool


AUTHORS = Size("(a) authors", 19, 7, 5, 256, 10, (512,) * 4, (512,) * 4, 10, True)


def default_preset() -> Size:
    """The default run's size on Lift."""
    config = parse_config(FinetuneRobomimicConfig, PRESETS, [])
    return Size(
        "(b) default preset",
        19,
        7,
        config.policy.chunk_length,
        config.batch_size,
        config.policy.num_flow_steps,
        config.policy.hidden_dims,
        config.critic.hidden_dims,
        config.critic.ensemble_size,
        config.trqam.train_base,
    )


def products(size: Size) -> Counter[Product]:
    """The matrix products of one update without sharing, with how often each is needed.

    Field evaluations: K for the next action, K for the SDE, K (forward and back to the input) for
    the adjoint, K of the tuned field in the loss (forward and back to the weights), K of the base
    there, and one with its gradient where the base keeps training. Critic evaluations: the target
    at the next state; online with its gradient; the target with its gradient to the action.
    """
    chunk = size.chunk_length * size.action_dim
    steps, batch = size.num_flow_steps, size.batch_size
    field = [size.observation_dim + chunk + 1, *size.hidden_dims, chunk]
    critic = [size.observation_dim + chunk, *size.critic_dims, 1]
    count: Counter[Product] = Counter()

    def add(widths: list[int], members: int, forward: int, to_input: int, to_weights: int) -> None:
        for index, (a, b) in enumerate(pairwise(widths)):
            count[members, batch, b, a] += forward
            # The gradient to the weights passes through every layer but the first.
            count[members, batch, a, b] += to_input + (to_weights if index else 0)
            count[members, a, b, batch] += to_weights

    trained = 1 if size.train_base else 0
    add(field, 1, 5 * steps + trained, steps, steps + trained)
    add(critic, size.ensemble_size, 3, 1, 1)
    return count


def flops(count: Counter[Product]) -> float:
    """Multiplications and additions."""
    return float(sum(2 * e * m * n * k * times for (e, m, n, k), times in count.items()))


def elapsed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_product(shape: Product) -> Callable[[], object]:
    """Torch's own matrix product of this shape."""
    members, rows, columns, inner = shape
    a, b = torch.randn(members, rows, inner), torch.randn(members, inner, columns)
    return lambda: torch.bmm(a, b)


def measure(size: Size, seconds: float) -> tuple[float, float]:
    """Median seconds of one update, and of the products of its work, for about so many seconds.

    The two take turns in short rounds: a machine whose speed drifts slows both.
    """
    update = make_update(size)
    count = {shape: times for shape, times in products(size).items() if times}
    calls = {shape: make_product(shape) for shape in count}
    for call in (update, *calls.values()):
        call()
    burst = max(1, round(0.2 / elapsed(update)))
    updates: list[float] = []
    rounds: dict[Product, list[float]] = {shape: [] for shape in count}
    end = time.perf_counter() + seconds
    while len(updates) < 10 or time.perf_counter() < end:
        updates += [elapsed(update) for _ in range(burst)]
        for shape, call in calls.items():
            # The first of a row fetches its operands into the cache.
            rounds[shape].append(median([elapsed(call) for _ in range(4)]))
    return median(updates), sum(count[s] * median(rounds[s]) for s in count)


def make_update(size: Size) -> Callable[[], object]:
    """One update of a method of this size on a random batch, noise included."""
    torch.manual_seed(0)
    shape = MLPFlowConfig(
        size.observation_dim,
        size.action_dim,
        size.chunk_length,
        size.hidden_dims,
        num_flow_steps=size.num_flow_steps,
    )
    ensemble = CriticEnsemble(
        size.observation_dim,
        size.chunk_length * size.action_dim,
        size.critic_dims,
        size.ensemble_size,
    )
    config = TRQAMConfig(train_base=size.train_base)
    method = TRQAM(MLPFlowPolicy(shape), Critic(ensemble), config)
    rows, generator = size.batch_size, torch.Generator().manual_seed(0)
    batch = TransitionBatch(
        observation=torch.randn(rows, size.observation_dim),
        action=torch.rand(rows, size.chunk_length, size.action_dim) * 2 - 1,
        chunk_return=torch.randn(rows),
        next_observation=torch.randn(rows, size.observation_dim),
        discount=torch.full((rows,), 0.95),
        terminated=torch.zeros(rows, dtype=torch.bool),
        truncated=torch.zeros(rows, dtype=torch.bool),
        valid=torch.ones(rows, size.chunk_length, dtype=torch.bool),
    )

    def update() -> object:
        noise = UpdateNoise.draw(batch.action, size.num_flow_steps, generator)
        return method.update(batch, noise)

    return update


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time a size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the recipe does
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads")
    columns = ("s/update", "updates/s", "GFLOP", "products s", "ratio")
    print(f"{'size':<20}" + "".join(f"{name:>12}" for name in columns))
    for size in (AUTHORS, default_preset()):
        seconds, machine = measure(size, arguments.seconds)
        work = flops(products(size)) / 1e9
        print(
            f"{size.label:<20}{seconds:>12.4f}{1 / seconds:>12.1f}{work:>12.1f}"
            f"{machine:>12.4f}{seconds / machine:>12.2f}"
        )


if __name__ == "__main__":
    main()

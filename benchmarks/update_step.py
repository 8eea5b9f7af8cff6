"""Times one TRQAM update of either chain, against the matrix products that it is made of.

    python benchmarks/update_step.py
    python benchmarks/update_step.py --flow_steps 4 2 --adjoint scalar

For each size, in one run and in turns: the authors' chain (shifted Euler, ten steps), the default
preset's, and the posterior one of every number of steps that is asked for. A row has the seconds of
one update; their ratio to the authors' chain; the floating-point work that :func:`products` counts;
the time this machine's own matrix product takes for it, measured in the same run at the same shapes
and threads; and the ratio of the update's time to that. (a) is the size of the authors' runs, (b)
the default preset of ``recipes/finetune_robomimic.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import get_args

import torch
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes.finetune_robomimic import PRESETS

from vla_trqam.adjoint import AdjointKind
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.processes.memory import keep_freed_memory
from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import TRQAM, SchemeName, TRQAMConfig, UpdateNoise

Product = tuple[int, int, int, int]
"""(E, M, N, K): E products of (M, K) by (K, N)."""


@dataclass(frozen=True)
class Chain:
    """How the path is made, and the adjoint along it."""

    scheme: SchemeName
    num_flow_steps: int
    adjoint: AdjointKind = "lean"

    @property
    def label(self) -> str:
        """Of a row."""
        return f"{self.scheme} {self.num_flow_steps}{' scalar' * (self.adjoint == 'scalar')}"


AUTHORS_CHAIN = Chain("shifted_euler", 10)


@dataclass(frozen=True)
class Size:
    """What beside the chain decides the cost of an update."""

    label: str
    observation_dim: int
    action_dim: int
    chunk_length: int
    batch_size: int
    hidden_dims: tuple[int, ...]
    critic_dims: tuple[int, ...]
    ensemble_size: int
    train_base: bool


AUTHORS = Size("(a) authors' size", 19, 7, 5, 256, (512,) * 4, (512,) * 4, 10, True)


def preset_size(label: str, config: FinetuneRobomimicConfig) -> Size:
    """The size of a run on Lift with these settings."""
    return Size(
        label,
        19,
        7,
        config.policy.chunk_length,
        config.batch_size,
        config.policy.hidden_dims,
        config.critic.hidden_dims,
        config.critic.ensemble_size,
        config.method.trains_the_base,
    )


def default_preset() -> tuple[Size, Chain]:
    """The default run's size on Lift, and its chain."""
    config = parse_config(FinetuneRobomimicConfig, PRESETS, [])
    knobs = config.method
    assert isinstance(knobs, TRQAMConfig)
    steps = config.policy.tuned_flow_steps or config.policy.num_flow_steps
    chain = Chain(knobs.scheme, steps, knobs.adjoint)
    return preset_size("(b) default preset", config), chain


def products(size: Size, chain: Chain) -> Counter[Product]:
    """The matrix products of one update, with how often each is needed.

    Field evaluations of shifted Euler, in the authors' way, which shares none: K for the next
    action, K for the SDE, K (forward and back to the input) for the adjoint, K of the tuned field
    in the loss (forward and back to the weights), K of the base there. Of the posterior chain, what
    it needs where each is made once: K for the next action, K of the tuned field (forward and back
    to the weights), K of the base; K - 1 of these back to the input for the lean adjoint. Both: one
    with its gradient where the base keeps training. Critic evaluations: the target at the next
    state; online with its gradient; the target with its gradient to the action.
    """
    chunk = size.chunk_length * size.action_dim
    steps, batch = chain.num_flow_steps, size.batch_size
    network = [size.observation_dim + chunk + 1, *size.hidden_dims, chunk]
    critic = [size.observation_dim + chunk, *size.critic_dims, 1]
    count: Counter[Product] = Counter()

    def add(widths: list[int], members: int, forward: int, to_input: int, to_weights: int) -> None:
        for index, (a, b) in enumerate(pairwise(widths)):
            count[members, batch, b, a] += forward
            # The gradient to the weights passes through every layer but the first.
            count[members, batch, a, b] += to_input + (to_weights if index else 0)
            count[members, a, b, batch] += to_weights

    trained = 1 if size.train_base else 0
    shared = chain.scheme == "posterior"
    pulled = 0 if chain.adjoint == "scalar" else steps - 1 if shared else steps
    forward = 3 * steps if shared else 4 * steps + pulled
    add(network, 1, forward + trained, pulled, steps + trained)
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


@dataclass
class Timing:
    """What was measured of one chain."""

    update: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure(size: Size, chains: Sequence[Chain], seconds: float) -> list[tuple[float, float]]:
    """Of every chain the median seconds of an update, and those of the products of its work.

    All of them take turns in short rounds, for about so many seconds: a machine whose speed drifts
    slows them alike.
    """
    timings = [Timing(make_update(size, chain)) for chain in chains]
    counts = [products(size, chain) for chain in chains]
    calls = {shape: make_product(shape) for shape in sum(counts, Counter())}
    for call in (*(timing.update for timing in timings), *calls.values()):
        call()
    burst = max(1, round(0.2 / elapsed(timings[0].update)))
    rounds: dict[Product, list[float]] = {shape: [] for shape in calls}
    end = time.perf_counter() + seconds
    while len(timings[0].seconds) < 10 or time.perf_counter() < end:
        for timing in timings:
            timing.seconds += [elapsed(timing.update) for _ in range(burst)]
        for shape, call in calls.items():
            # The first of a row fetches its operands into the cache.
            rounds[shape].append(median([elapsed(call) for _ in range(4)]))
    machine = {shape: median(found) for shape, found in rounds.items()}
    return [
        (median(timing.seconds), sum(times * machine[shape] for shape, times in (+count).items()))
        for timing, count in zip(timings, counts, strict=True)
    ]


def make_update(size: Size, chain: Chain) -> Callable[[], object]:
    """One update of a method of this size on a random batch, noise included."""
    torch.manual_seed(0)
    shape = MLPFlowConfig(
        size.observation_dim,
        size.action_dim,
        size.chunk_length,
        size.hidden_dims,
        num_flow_steps=chain.num_flow_steps,
    )
    ensemble = CriticEnsemble(
        size.observation_dim,
        size.chunk_length * size.action_dim,
        size.critic_dims,
        size.ensemble_size,
    )
    config = TRQAMConfig(scheme=chain.scheme, adjoint=chain.adjoint, train_base=size.train_base)
    method = TRQAM(MLPFlowPolicy(shape), Critic(ensemble), config)
    batch, generator = make_batch(size), torch.Generator().manual_seed(0)

    def update() -> object:
        noise = UpdateNoise.draw(batch.action, chain.num_flow_steps, generator)
        return method.update_with(batch, noise)

    return update


def make_batch(size: Size) -> TransitionBatch:
    """Random transitions that neither end nor are cut."""
    rows = size.batch_size
    return TransitionBatch(
        observation=torch.randn(rows, size.observation_dim),
        action=torch.rand(rows, size.chunk_length, size.action_dim) * 2 - 1,
        chunk_return=torch.randn(rows),
        next_observation=torch.randn(rows, size.observation_dim),
        discount=torch.full((rows,), 0.95),
        terminated=torch.zeros(rows, dtype=torch.bool),
        truncated=torch.zeros(rows, dtype=torch.bool),
        valid=torch.ones(rows, size.chunk_length, dtype=torch.bool),
    )


def table_rows(size: Size, chains: Sequence[Chain], seconds: float) -> list[str]:
    """The table's rows of one size; the first chain is what the others are compared with."""
    found = measure(size, chains, seconds)
    authors, _ = found[0]
    table = []
    for chain, (update, machine) in zip(chains, found, strict=True):
        work = flops(products(size, chain)) / 1e9
        table.append(
            f"{size.label:<20}{chain.label:<19}{update:>10.4f}{1 / update:>11.1f}"
            f"{update / authors:>8.2f}{work:>8.1f}{machine:>12.4f}{update / machine:>8.2f}"
        )
    return table


HEADER = (
    f"{'size':<20}{'chain':<19}{'s/update':>10}{'updates/s':>11}{'ratio':>8}"
    f"{'GFLOP':>8}{'products s':>12}{'ratio':>8}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for a chain that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--flow_steps", type=int, nargs="*", default=[10, 4, 2], help="of posterior chains"
    )
    parser.add_argument("--adjoint", choices=get_args(AdjointKind), default="lean", help="of these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time a size")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as the recipe does
    size, default = default_preset()
    asked = [Chain("posterior", steps, given.adjoint) for steps in given.flow_steps]
    chains = list(dict.fromkeys([AUTHORS_CHAIN, default, *asked]))
    print(f"torch {torch.__version__}, {platform.machine()}, {given.threads} threads")
    print(f"the default preset's chain: {default.label}\n{HEADER}", flush=True)
    try:
        for one in (AUTHORS, size):
            print("\n".join(table_rows(one, chains, given.seconds)), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

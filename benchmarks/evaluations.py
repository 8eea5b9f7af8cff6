"""Counts how often every method asks the fields, and times an update and an act of each.

    python benchmarks/evaluations.py --page docs/methods/README.md
    OMP_NUM_THREADS=1 python benchmarks/evaluations.py --seconds 5 --page docs/methods/README.md

Every method of the registry makes one update and one act with a small policy whose fields are
watched: evaluations forward, gradients that come back through one to its input, and to its weights,
a sample each; and of the critics, gradients to the action. A field is whatever of a method has a
``velocity``. Nothing is claimed: a hook sits on every evaluation's input and weights. The kernels
are off (``--kernels=plain``), which share evaluations and hide them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from marked import put
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.graph import Node
from update_step import Size, make_batch, preset_size
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes.finetune_robomimic import PRESETS

from vla_trqam.config.methods import DEFAULT_TYPE, TYPE
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.engine.processes.memory import keep_freed_memory
from vla_trqam.kernel_choice import chosen_kernels
from vla_trqam.methods.base import GeneratorNoise, MethodConfig, OffPolicyMethod
from vla_trqam.methods.registry import METHODS, make_method
from vla_trqam.methods.reward_matching import NETWORKS, TARGET, RewardMatchingConfig
from vla_trqam.report.formats import table

COUNTED_STEPS = (4, 10)
CHECKED_STEPS = 6
VELOCITIES = ("velocity", "base_velocity", "behaviour_velocity")
SMALL = Size("counted", 3, 2, 2, 4, (8,), (8,), 2, False)
VARIANTS: dict[str, Any] = {"adjoint": "scalar", "scheme": "shifted_euler", "train_base": True}
"""Knobs of the default method that change what is asked of the fields."""


class Meter:
    """Counts evaluations of functions, in shares of a batch.

    Args:
        rows: of the batch: so many samples evaluated count 1.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.counts: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, kind: str, place: int) -> None:
        """From now on counts calls of ``owner.name``.

        Args:
            owner: whose attribute is put before its class's.
            name: of the method.
            kind: what its calls count as.
            place: of the argument that gradients are counted to.
        """
        setattr(owner, name, partial(self._called, getattr(owner, name), kind, place))

    def _called(
        self, call: Callable[..., Tensor], kind: str, place: int, *args: Any, **how: Any
    ) -> Tensor:
        given = args[place]
        share = len(given) / self._rows
        self.counts[kind] += share  # type: ignore[assignment]
        entry = given
        if torch.is_grad_enabled() and given.requires_grad:
            # A node of its own, in front of which the evaluation begins.
            entry = given.view_as(given)
            entry.register_hook(lambda _: self._add(f"{kind} to input", share))
        value = call(*args[:place], entry, *args[place + 1 :], **how)
        if value.grad_fn is not None:
            _on_weights(
                value.grad_fn, entry.grad_fn, lambda: self._add(f"{kind} to weights", share)
            )
        return value

    def _add(self, name: str, share: float) -> None:
        self.counts[name] += share  # type: ignore[assignment]


def _on_weights(end: Node, begin: Node | None, tell: Callable[[], None]) -> None:
    """Calls ``tell`` once when a gradient reaches any leaf between the two nodes."""
    told, seen, left = count(), {end, begin}, [end]
    while left:
        node = left.pop()
        for place, (before, _) in enumerate(node.next_functions):
            if before is None or before in seen:
                continue
            if before.name() == "torch::autograd::AccumulateGrad":
                node.register_hook(partial(_tell_once, place, told, tell))
            else:
                seen.add(before)
                left.append(before)


def _tell_once(
    place: int, told: Any, tell: Callable[[], None], gradients: Sequence[Tensor | None], _: Any
) -> None:
    if gradients[place] is not None and next(told) == 0:
        tell()


def watched(method: OffPolicyMethod, rows: int) -> Meter:
    """A meter on all fields and critics of a method."""
    meter = Meter(rows)
    owned = {id(m): m for module in method.modules().values() for m in module.modules()}
    for module in owned.values():
        for name in VELOCITIES:
            if hasattr(module, name):
                meter.watch(module, name, "field", 0)
        if isinstance(module, CriticEnsemble):
            meter.watch(module, "forward", "critic", 1)
    return meter


def make(config: MethodConfig, size: Size, num_flow_steps: int) -> OffPolicyMethod:
    """A method on a random MLP policy of this size; a reward that is to be given is its critic."""
    torch.manual_seed(0)
    shape = MLPFlowConfig(
        size.observation_dim,
        size.action_dim,
        size.chunk_length,
        size.hidden_dims,
        num_flow_steps=num_flow_steps,
    )
    ensemble = CriticEnsemble(
        size.observation_dim,
        size.chunk_length * size.action_dim,
        size.critic_dims,
        size.ensemble_size,
    )
    policy, critic = MLPFlowPolicy(shape), Critic(ensemble)
    if not isinstance(config, RewardMatchingConfig) or config.reward_path is not None:
        return make_method(policy, critic, config)
    with TemporaryDirectory() as folder:
        path = Path(folder) / NETWORKS
        path.parent.mkdir()
        save_file({TARGET + k: v for k, v in ensemble.state_dict().items()}, path)
        return make_method(policy, critic, replace(config, reward_path=Path(folder)))


def act(method: OffPolicyMethod, observation: Tensor, generator: torch.Generator) -> Tensor:
    """What is executed at these observations."""
    with torch.no_grad():
        context = method.policy.encode(observation)
    noise = GeneratorNoise(generator, len(observation), torch.device("cpu"))
    return method.actor().chunk(context, noise)


@dataclass(frozen=True)
class Counts:
    """Evaluations a sample of one update, and a chunk of acting.

    Attributes:
        forward: of a field, in an update.
        pullback: gradients through a field to its input.
        backward: gradients through a field to its weights.
        uphill: gradients of a critic to the action.
        acted: evaluations of a field for one chunk that is executed.
        judged: evaluations of a critic for it.
    """

    forward: float
    pullback: float
    backward: float
    uphill: float
    acted: float
    judged: float


def counts_of(config: MethodConfig, num_flow_steps: int) -> Counts:
    """Of one update and one act; the second update, for the first may do what others do not."""
    with chosen_kernels("plain"):
        method, batch = make(config, SMALL, num_flow_steps), make_batch(SMALL)
        generator = torch.Generator().manual_seed(0)
        method.update(batch, generator)
        meter = watched(method, SMALL.batch_size)
        method.update(batch, generator)
        update = Counter(meter.counts)
        meter.counts.clear()
        act(method, batch.observation, generator)
    return Counts(
        forward=update["field"],
        pullback=update["field to input"],
        backward=update["field to weights"],
        uphill=update["critic to input"],
        acted=meter.counts["field"],
        judged=meter.counts["critic"],
    )


def configs() -> dict[str, MethodConfig]:
    """Every method with its default knobs, and variants of the default method, by label."""
    found: dict[str, MethodConfig] = {}
    for name, entry in METHODS.items():
        found[name] = entry.config()
        if name == DEFAULT_TYPE:
            for knob, value in VARIANTS.items():
                config: Any = entry.config
                found[f"{name}, `{knob}: {str(value).lower()}`"] = config(**{knob: value})
    return found


def in_steps(low: float, high: float, check: float) -> str:
    """A count as a function of K, from its values at K = 4, 10 and, to check, 6."""
    first, last = COUNTED_STEPS
    slope = (high - low) / (last - first)
    rest = low - slope * first
    if abs(rest + slope * CHECKED_STEPS - check) > 1e-9:
        return f"{low:g} at K = {first}, {high:g} at K = {last}"
    terms = "" if slope == 0 else "K" if slope == 1 else f"{slope:g}K"
    if not terms or rest == 0:
        return terms or f"{rest:g}"
    return f"{terms} {'+' if rest > 0 else '-'} {abs(rest):g}"


def counts_table() -> str:
    """A row a method."""
    header = (
        *("method", "update: field", "to its input", "to its weights", "critic to the action"),
        *("act: field", "critic"),
    )
    rows = []
    for label, config in configs().items():
        low, high, check = (counts_of(config, k) for k in (*COUNTED_STEPS, CHECKED_STEPS))
        names = [field.name for field in fields(Counts)]
        cells = [in_steps(*(getattr(found, n) for found in (low, high, check))) for n in names]
        rows.append([label, *cells])
    return table(header, rows)


@dataclass
class Timed:
    """A method at the default preset's size, and what its calls took, in processor seconds."""

    update: Callable[[], object]
    act: Callable[[], object]
    updates: list[float]
    acts: list[float]


def timed(name: str) -> Timed:
    """A method as the default preset of Robomimic has it."""
    config = parse_config(FinetuneRobomimicConfig, PRESETS, [f"--{TYPE}={name}"])
    size = preset_size(name, config)
    steps = config.policy.tuned_flow_steps or config.policy.num_flow_steps
    method, batch = make(config.method, size, steps), make_batch(size)
    generator = torch.Generator().manual_seed(0)
    return Timed(
        lambda: method.update(batch, generator),
        lambda: act(method, batch.observation[:1], generator),
        [],
        [],
    )


def speed_table(seconds: float) -> str:
    """Processor seconds of an update and of an act, all methods in turns."""
    methods = {name: timed(name) for name in METHODS}
    for method in methods.values():
        method.update()
        method.act()
    end = time.perf_counter() + seconds * len(methods)
    while time.perf_counter() < end or len(methods[DEFAULT_TYPE].updates) < 5:
        for method in methods.values():
            method.updates += [spent(method.update) for _ in range(5)]
            method.acts += [spent(method.act) for _ in range(5)]
    best = median(methods[DEFAULT_TYPE].updates)
    rows = [
        [name, *(f"{1000 * median(s):.2f}" for s in (m.updates, m.acts)), _rate(best, m.updates)]
        for name, m in methods.items()
    ]
    day, threads = datetime.now(UTC).date().isoformat(), torch.get_num_threads()
    return (
        f"{day}, torch {torch.__version__}, {threads} thread of a shared machine, processor time, "
        "medians in turns; an update of the preset's batch, an act at one observation:\n\n"
        + table(
            ("method", "update, ms", "act, ms", f"rate of updates, {DEFAULT_TYPE} = 1"),
            rows,
        )
    )


def _rate(best: float, seconds: Sequence[float]) -> str:
    return f"{best / median(seconds):.2f}"


def spent(call: Callable[[], object]) -> float:
    """Processor seconds of a call, which others on the machine hardly change."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, and writes into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    parser.add_argument("--seconds", type=float, help="time the methods for so long each instead")
    given = parser.parse_args(arguments)
    if given.seconds is None:
        name, text = "evaluations", counts_table()
    else:
        torch.set_num_threads(1)
        keep_freed_memory()  # as the recipe does
        name, text = "speed", speed_table(given.seconds)
    print(text)
    if given.page is not None:
        put(given.page, name, text)


if __name__ == "__main__":
    main()

"""The cost of one TRQAM update of a LeRobot policy against one step of behaviour cloning.

    python benchmarks/vla_update.py                                     # tiny pi0 on the CPU
    python benchmarks/vla_update.py --num_flow_steps 4 --compare --compile
    python benchmarks/vla_update.py --policy pi0 --size full --device cuda --dtype bfloat16
    python benchmarks/vla_update.py --policy pi0 --size full --device meta --dtype bfloat16

Both train the same LoRA adapters in the same randomly initialised model on the same observations,
in one run and in turns. Behaviour cloning is LeRobot's own ``update_policy`` with the optimiser and
the Accelerator that ``lerobot-train`` makes. With ``--compare`` an update of the authors' chain
(shifted Euler, ten steps) takes its turn too, and with ``--compile`` the same update with its path
compiled (``--policy.compile=true``), with ``--cuda_graphs`` replayed
(``--policy.cuda_graphs=true``). The last command needs no memory for the weights: it
counts parameters, floating-point work and bytes and measures no time. Every command counts the
evaluations of the action expert in one update.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from vla_costs.meter import Parts, clock, counting_work, peak_bytes, peak_bytes_prepared
from vla_costs.models import (
    POLICIES,
    Setup,
    cloning_batch,
    make_batch,
    make_observation,
    make_policy,
)
from vla_costs.steps import PARTS, REST, Cloning, CloningOnMeta, Sped, Update
from vla_trqam.adapters.fields.evaluations import Evaluations
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.adjoint import AdjointKind
from vla_trqam.engine.processes.memory import keep_freed_memory
from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import SchemeName, TRQAMConfig
from vla_trqam.time_grid import TimeGrid

Step = Callable[[], object]
AUTHORS_SCHEME: SchemeName = "shifted_euler"
AUTHORS_STEPS = 10
SIDES = {
    "trqam": "TRQAM update",
    "authors": "authors' chain",
    "cloning": "cloning step",
    "compiled": "TRQAM update, compiled",
    "graphs": "TRQAM update, CUDA graphs",
}
SPED: dict[str, Callable[[Evaluations, int], None]] = {
    "compiled": lambda evaluations, _: evaluations.compile(),
    "graphs": lambda evaluations, rows: evaluations.record({rows}),
}
GIB = 2**30
CHAIN = ("scheme", "adjoint", "loss_steps", "keep_activations")
OPTIONS = (
    "compare",
    "cached_prefix",
    "one_prefix",
    "updates",
    "warm_up",
    "compile",
    "cuda_graphs",
)


@dataclass
class Result:
    """Everything that was found; what was not measured is None or empty.

    Attributes:
        setup: what was measured.
        chain: of the TRQAM update, and how it was computed.
        cached_prefix: whether TRQAM got encoded observations instead of images and text.
        one_prefix: whether its next actions were drawn before (``critic.draw_next=false``).
        versions: of what computed.
        dtypes: of the weights without adapters, the commonest first.
        parameters: of the whole model, and of the adapters.
        model_bytes: of parameters and buffers.
        evaluations: of the action expert in one update, by side and kind.
        seconds: of every measured step, by side (:data:`SIDES`).
        part_seconds: of one TRQAM update by part, medians, the device waited for at every part.
        work: floating-point operations in matrix products, by side.
        part_work: of one TRQAM update, by part.
        peak_bytes: beyond the model, during one step, by side.
    """

    setup: dict[str, Any]
    chain: dict[str, Any]
    cached_prefix: bool
    one_prefix: bool
    versions: dict[str, str]
    dtypes: list[str]
    parameters: dict[str, int]
    model_bytes: int
    evaluations: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    part_seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    part_work: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def measure(
    setup: Setup,
    config: TRQAMConfig,
    *,
    compare: bool,
    cached_prefix: bool,
    one_prefix: bool,
    updates: int,
    warm_up: int,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> Result:
    """Builds the sides and meters them; see the module."""
    TimeGrid(setup.num_flow_steps, config.chain).steps  # noqa: B018 (refuses what cannot be)
    policy = make_policy(setup)
    device = torch.device(setup.device)
    result = _describe(policy, setup, config, cached_prefix, one_prefix)
    observations = [make_observation(policy, setup, seed) for seed in (0, 1)]
    length, _ = policy.chunk_shape
    action = torch.rand(setup.batch_size, length, setup.action_dim, device=device) * 2 - 1
    make_cloning = CloningOnMeta if device.type == "meta" else Cloning
    cloning = make_cloning(policy, cloning_batch(policy, observations[0], action))
    sides: dict[str, Step] = {"cloning": cloning}
    _once(result, "cloning", cloning, device)
    seen, following = (policy.packed(o) if cached_prefix else o for o in observations)
    batch = make_batch(policy, seen, following, action)
    chains = {"trqam": (config, setup.num_flow_steps)}
    if compare:
        authors = TRQAMConfig(scheme=AUTHORS_SCHEME, keep_activations=config.keep_activations)
        chains["authors"] = (authors, AUTHORS_STEPS)
    made = {
        side: Update(policy, batch, *chain, one_prefix=one_prefix and side == "trqam")
        for side, chain in chains.items()
    }
    for side, update in made.items():
        _once(result, side, update, device)
        result.evaluations[side] = update.evaluations()
    with counting_work() as read:
        parts = Parts(read)
        with made["trqam"].metered(parts), parts.of(REST):
            made["trqam"]()
    result.part_work = dict(parts.spent)
    if device.type != "meta":
        wanted = {"compiled": compile, "graphs": cuda_graphs}
        plain = made["trqam"]
        extra = {side: Sped(policy, plain, SPED[side]) for side in SPED if wanted[side]}
        for side, sped in extra.items():
            result.peak_bytes[side] = peak_bytes_prepared(sped, device)
        _time(result, sides | made | extra, made["trqam"], device, updates, warm_up)
    return result


def _once(result: Result, side: str, step: Step, device: torch.device) -> None:
    """Memory and work of one step, after one that makes gradients and optimiser state."""
    step()
    result.peak_bytes[side] = peak_bytes(step, device)
    with counting_work() as read:
        step()
        result.work[side] = read()


def _time(
    result: Result,
    sides: dict[str, Step],
    update: Update,
    device: torch.device,
    updates: int,
    warm_up: int,
) -> None:
    """Both sides in turns: a machine whose speed drifts slows both."""
    read = clock(device)
    found: dict[str, list[float]] = {part: [] for part in (*PARTS, REST)}
    result.seconds = {side: [] for side in sides}
    for turn in range(warm_up + updates):
        for side, step in sides.items():
            start = read()
            step()
            if turn >= warm_up:
                result.seconds[side].append(read() - start)
        parts = Parts(read)
        with update.metered(parts), parts.of(REST):
            update()
        if turn >= warm_up:
            for part, seconds in found.items():
                seconds.append(parts.spent[part])
    result.part_seconds = {part: median(seconds) for part, seconds in found.items()}


def _describe(
    policy: LeRobotFlowPolicy,
    setup: Setup,
    config: TRQAMConfig,
    cached_prefix: bool,
    one_prefix: bool,
) -> Result:
    parameters = list(policy.parameters())
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        if not parameter.requires_grad:
            dtypes[parameter.dtype] += parameter.numel()
    everything = {t.untyped_storage()._cdata: t for t in (*parameters, *policy.buffers())}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if setup.device == "cuda":
        versions["device"] = torch.cuda.get_device_name()
    else:
        versions["device"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Result(
        asdict(setup),
        {name: getattr(config, name) for name in CHAIN},
        cached_prefix,
        one_prefix,
        versions,
        [str(dtype).removeprefix("torch.") for dtype, _ in dtypes.most_common()],
        {
            "model": sum(p.numel() for p in parameters),
            "adapters": sum(p.numel() for p in policy.trainable_parameters()),
        },
        sum(t.untyped_storage().nbytes() for t in everything.values()),
    )


def report(result: Result) -> str:
    """The table."""
    lines = [
        _heading(result),
        f"{result.parameters['model']:,} parameters, {result.parameters['adapters']:,} in "
        f"adapters, {result.model_bytes / GIB:.3f} GiB",
        f"{'':<26}{'seconds':>10}{'GFLOP':>12}{'peak GiB':>11}{'with model':>12}",
    ]
    seconds = {side: median(found) for side, found in result.seconds.items()}
    for side, label in SIDES.items():
        if side in result.peak_bytes:
            peak = result.peak_bytes[side]
            cells = f"{peak / GIB:>11.4f}{(peak + result.model_bytes) / GIB:>12.4f}"
            lines.append(
                _row(label, seconds.get(side), result.work.get(side, result.work["trqam"])) + cells
            )
    others = [side for side in ("authors", "cloning") if side in result.work]
    lines += [_ratios(result, seconds, "trqam", other) for other in others]
    sped = [side for side in SPED if side in seconds]
    lines += [_ratios(result, seconds, side, other) for side in sped for other in others]
    for part in (*PARTS, REST):
        work = result.part_work.get(part, 0.0)
        lines.append(_row("  " + part, result.part_seconds.get(part), work))
    for side, count in result.evaluations.items():
        lines.append(f"evaluations, {SIDES[side]}: {_evaluations(count)}")
    return "\n".join(lines)


def _heading(result: Result) -> str:
    setup, chain = result.setup, result.chain
    words = [
        f"{setup['policy']} {setup['size']}",
        f"batch {setup['batch_size']}",
        f"{chain['scheme']}, K {setup['num_flow_steps']}",
        f"{chain['adjoint']} adjoint",
        " and ".join(result.dtypes),
        *result.versions.values(),
    ]
    if chain["loss_steps"] is not None:
        words.append(f"loss on {chain['loss_steps']} steps")
    words += ["cached prefix"] * result.cached_prefix + ["one prefix"] * result.one_prefix
    words += ["activations computed again"] * (not chain["keep_activations"])
    return ", ".join(words)


def _ratios(result: Result, seconds: dict[str, float], side: str, other: str) -> str:
    """Of an update to another side: seconds, work, and memory without and with the model."""
    time = f"{seconds[side] / seconds[other]:.2f}" if seconds else "not run"
    work = result.work["trqam"] / result.work[other]
    memory, whole = (
        (result.peak_bytes[side] + extra) / (result.peak_bytes[other] + extra)
        for extra in (0, result.model_bytes)
    )
    heading = SIDES[side].removeprefix("TRQAM update, ") if side in SPED else "ratio"
    numbers = f"{time:>10}{work:>12.2f}{memory:>11.2f}{whole:>12.2f}"
    return f"{f'{heading} to the {SIDES[other]}':<26}" + numbers


def _evaluations(count: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in count.items())


def _row(label: str, seconds: float | None, work: float) -> str:
    time = "not run" if seconds is None else f"{seconds:.4f}"
    return f"{label:<26}{time:>10}{work / 1e9:>12.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--policy", choices=POLICIES, default="tiny_pi0")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda", "meta"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--num_flow_steps", type=int, default=10)
    parser.add_argument("--scheme", choices=get_args(SchemeName), default=TRQAMConfig.scheme)
    parser.add_argument("--adjoint", choices=get_args(AdjointKind), default=TRQAMConfig.adjoint)
    parser.add_argument("--loss_steps", type=int, help="of the K, as --method.loss_steps")
    parser.add_argument(
        "--keep_activations",
        choices=("true", "false"),
        default="true",
        help="false computes them again, one step of the chain at a time",
    )
    parser.add_argument(
        "--compare", action="store_true", help="with the authors' chain: shifted Euler, K = 10"
    )
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--cached_prefix", action="store_true", help="for TRQAM; cloning has none")
    parser.add_argument(
        "--one_prefix", action="store_true", help="TRQAM as with --critic.draw_next=false"
    )
    parser.add_argument("--compile", action="store_true", help="times a compiled update as well")
    parser.add_argument(
        "--cuda_graphs", action="store_true", help="times one that is replayed from CUDA graphs"
    )
    parser.add_argument("--updates", type=int, default=10, help="measured, in turns")
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was found")
    given = vars(parser.parse_args(arguments))
    output, threads = given.pop("output"), given.pop("threads")
    knobs = {name: given.pop(name) for name in CHAIN}
    knobs["keep_activations"] = knobs["keep_activations"] == "true"
    options = {name: given.pop(name) for name in OPTIONS}
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the recipes do
    try:
        if given["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError("--device=cuda: torch finds no CUDA device here")
        result = measure(Setup(**given), TRQAMConfig(**knobs), **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if output is not None:
        output.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cost of one TRQAM update of a LeRobot policy against one step of behaviour cloning.

    python benchmarks/vla_update.py                                     # tiny pi0 on the CPU
    python benchmarks/vla_update.py --policy pi0 --size full --device cuda --dtype bfloat16
    python benchmarks/vla_update.py --policy pi0 --size full --device meta --dtype bfloat16

Both train the same LoRA adapters in the same randomly initialised model on the same observations,
in one run and in turns. Behaviour cloning is LeRobot's own ``update_policy`` with the optimiser and
the Accelerator that ``lerobot-train`` makes. The third command needs no memory for the weights: it
counts parameters, floating-point work and bytes and measures no time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from step_meter import Parts, clock, counting_work, peak_bytes
from torch import Tensor, nn
from vla_models import POLICIES, Setup, cloning_batch, make_batch, make_observation, make_policy
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.methods import trqam
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, TRQAMLoss, UpdateNoise
from vla_trqam.training.memory import keep_freed_memory

Step = Callable[[], object]
PARTS = ("prefix", "SDE and next action", "critic", "adjoint", "loss", "backward", "optimiser")
REST = "rest"


@dataclass
class Result:
    """Everything that was found; what was not measured is None or empty.

    Attributes:
        setup: what was measured.
        cached_prefix: whether TRQAM got encoded observations instead of images and text.
        versions: of what computed.
        parameters: of the whole model, and of the adapters.
        model_bytes: of parameters and buffers.
        seconds: of every measured step, by side ("trqam", "cloning").
        part_seconds: of one TRQAM update by part, medians, the device waited for at every part.
        work: floating-point operations in matrix products, by side.
        part_work: of one TRQAM update, by part.
        peak_bytes: beyond the model, during one step, by side.
    """

    setup: dict[str, Any]
    cached_prefix: bool
    versions: dict[str, str]
    parameters: dict[str, int]
    model_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    part_seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    part_work: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


class Update:
    """One TRQAM update, its parts metered on request.

    Without memory (device ``meta``) it ends before the optimiser, which wants numbers.
    """

    def __init__(self, policy: LeRobotFlowPolicy, batch: Any) -> None:
        self._policy, self._batch = policy, batch
        length, _ = policy.chunk_shape
        chunk = length * int(policy.action_mask.sum())
        device = batch.action.device
        critic = Critic(CriticEnsemble(policy.feature_dim, chunk).to(device))
        self._loss, self._method = TRQAMLoss(policy, critic, TRQAMConfig()), None
        if device.type != "meta":
            self._method = TRQAM(policy, critic, TRQAMConfig())
            self._loss = self._method.loss
        self._generator = torch.Generator(device="cpu" if device.type == "meta" else device)

    def __call__(self) -> None:
        """Noise and update."""
        steps, action = self._policy.num_flow_steps, self._batch.action
        if self._method is not None:
            self._method.update(
                self._batch, UpdateNoise.draw(action, steps, self._generator.manual_seed(0))
            )
            return
        noise = UpdateNoise(action, action, action.expand(steps, *action.shape), action, action)
        self._loss(self._batch, noise, 1.0).loss.backward()

    @contextmanager
    def metered(self, parts: Parts) -> Iterator[None]:
        """Inside, every update tells where its time (or work) goes."""
        loss = self._loss
        policy, critic = loss.policy, loss.critic
        calls: list[tuple[Any, str, str]] = [
            (policy, "encode", PARTS[0]),
            (trqam, "sample_path_and_next_action", PARTS[1]),
            (critic, "action_gradient", PARTS[2]),
            (critic, "next_value", PARTS[2]),
            (critic.online, "forward", PARTS[2]),
            (trqam, "lean_adjoint", PARTS[3]),
            (trqam, "adjoint_matching_loss", PARTS[4]),
            (Tensor, "backward", PARTS[5]),
            (nn.utils, "clip_grad_norm_", PARTS[6]),
            (critic, "update_target", PARTS[6]),
        ]
        if self._method is not None:
            calls += [
                (self._method.optimizer, "step", PARTS[6]),
                (self._method.optimizer, "zero_grad", PARTS[6]),
            ]
        with ExitStack() as stack:
            for owner, name, part in calls:
                counted = parts.metered(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, counted))
            stack.enter_context(mock.patch.object(policy, "path_fields", self._fields(parts)))
            yield

    def _fields(self, parts: Parts) -> Callable[..., Any]:
        make = self._policy.path_fields

        def fields(context: Any, next_context: Any) -> Any:
            with parts.of(PARTS[1]):
                made: Any = make(context, next_context)
            made.tuned, made.base = (parts.metered(PARTS[4], f) for f in (made.tuned, made.base))
            return made

        return fields


class Cloning:
    """One behaviour cloning step, as ``lerobot-train --peft.method_type=LORA`` takes it."""

    def __init__(self, policy: LeRobotFlowPolicy, batch: dict[str, Tensor]) -> None:
        from accelerate import Accelerator
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        config = policy.host.config
        preset = config.get_optimizer_preset()
        precision = {"bfloat16": "bf16", "float32": "no"}.get(getattr(config, "dtype", "float32"))
        accelerator = Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
        optimizer = accelerator.prepare(preset.build(policy.host.get_optim_params()))
        names = ("loss", "grad_norm", "lr", "update_s", "gpu_mem_gb")
        meters = {name: AverageMeter(name) for name in names}
        tracker = MetricsTracker(len(batch["action"]), 1, 1, meters, accelerator=accelerator)
        self._policy, self._batch = policy, batch
        self._step = lambda: update_policy(
            tracker, policy.model, batch, optimizer, preset.grad_clip_norm, accelerator
        )

    def __call__(self) -> None:
        """In training mode, as the host does it; back in evaluation mode behind it."""
        self._step()
        self._policy.eval()


class CloningOnMeta:
    """The same forward and backward pass where numbers do not exist: LeRobot's logs want them."""

    def __init__(self, policy: LeRobotFlowPolicy, batch: dict[str, Tensor]) -> None:
        self._host, self._batch = policy.host, batch

    def __call__(self) -> None:
        """The host's model, which its policy's ``forward`` calls with the same tensors."""
        host, batch = self._host, self._batch
        inputs = [
            *host._preprocess_images(batch),
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
        ]
        if "state_proj" in dict(host.model.named_children()):
            inputs.append(host.prepare_state(batch))
        action = host.prepare_action(batch)
        time = action.new_empty(len(action))
        host.model.forward(*inputs, action, torch.empty_like(action), time).mean().backward()


def measure(setup: Setup, *, cached_prefix: bool, updates: int, warm_up: int) -> Result:
    """Builds both sides and meters them; see the module."""
    policy = make_policy(setup)
    device = torch.device(setup.device)
    result = _describe(policy, setup, cached_prefix)
    observations = [make_observation(policy, setup, seed) for seed in (0, 1)]
    length, _ = policy.chunk_shape
    action = torch.rand(setup.batch_size, length, setup.action_dim, device=device) * 2 - 1
    make_cloning = CloningOnMeta if device.type == "meta" else Cloning
    cloning = make_cloning(policy, cloning_batch(policy, observations[0], action))
    sides: dict[str, Step] = {"cloning": cloning}
    _once(result, "cloning", cloning, device)
    seen, following = (policy.packed(o) if cached_prefix else o for o in observations)
    update = Update(policy, make_batch(policy, seen, following, action))
    sides["trqam"] = update
    _once(result, "trqam", update, device)
    with counting_work() as read:
        parts = Parts(read)
        with update.metered(parts), parts.of(REST):
            update()
    result.part_work = dict(parts.spent)
    if device.type != "meta":
        _time(result, sides, update, device, updates, warm_up)
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


def _describe(policy: LeRobotFlowPolicy, setup: Setup, cached_prefix: bool) -> Result:
    parameters = list(policy.parameters())
    everything = {t.untyped_storage()._cdata: t for t in (*parameters, *policy.buffers())}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if setup.device == "cuda":
        versions["device"] = torch.cuda.get_device_name()
    else:
        versions["device"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Result(
        asdict(setup),
        cached_prefix,
        versions,
        {
            "model": sum(p.numel() for p in parameters),
            "adapters": sum(p.numel() for p in policy.trainable_parameters()),
        },
        sum(t.untyped_storage().nbytes() for t in everything.values()),
    )


def report(result: Result) -> str:
    """The table."""
    setup, gib = result.setup, 2**30
    lines = [
        f"{setup['policy']} {setup['size']}, batch {setup['batch_size']}, "
        f"K {setup['num_flow_steps']}, {setup['dtype']}, {', '.join(result.versions.values())}"
        + (", cached prefix" if result.cached_prefix else ""),
        f"{result.parameters['model']:,} parameters, {result.parameters['adapters']:,} in "
        f"adapters, {result.model_bytes / gib:.3f} GiB",
        f"{'':<22}{'seconds':>10}{'GFLOP':>12}{'peak GiB':>11}{'with model':>12}",
    ]
    seconds = {side: median(found) for side, found in result.seconds.items()}
    for side, label in (("trqam", "TRQAM update"), ("cloning", "cloning step")):
        peak = result.peak_bytes[side]
        cells = f"{peak / gib:>11.4f}{(peak + result.model_bytes) / gib:>12.4f}"
        lines.append(_row(label, seconds.get(side), result.work[side]) + cells)
    ratio = _row("ratio", _ratio(seconds), None)
    work = result.work["trqam"] / result.work["cloning"]
    memory, whole = (
        (result.peak_bytes["trqam"] + extra) / (result.peak_bytes["cloning"] + extra)
        for extra in (0, result.model_bytes)
    )
    lines.append(f"{ratio[:32]}{work:>12.2f}{memory:>11.2f}{whole:>12.2f}")
    for part in (*PARTS, REST):
        work = result.part_work.get(part, 0.0)
        lines.append(_row("  " + part, result.part_seconds.get(part), work))
    return "\n".join(lines)


def _ratio(seconds: dict[str, float]) -> float | None:
    return seconds["trqam"] / seconds["cloning"] if seconds else None


def _row(label: str, seconds: float | None, work: float | None) -> str:
    time = f"{'not run' if seconds is None else f'{seconds:.4f}':>10}"
    return f"{label:<22}{time}" + (f"{work / 1e9:>12.3f}" if work is not None else "")


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
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--cached_prefix", action="store_true", help="for TRQAM; cloning has none")
    parser.add_argument("--updates", type=int, default=10, help="measured, in turns")
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was found")
    given = vars(parser.parse_args(arguments))
    output, threads = given.pop("output"), given.pop("threads")
    options = {name: given.pop(name) for name in ("cached_prefix", "updates", "warm_up")}
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the recipes do
    try:
        if given["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError("--device=cuda: torch finds no CUDA device here")
        result = measure(Setup(**given), **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if output is not None:
        output.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

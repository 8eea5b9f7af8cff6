"""What training will take of memory, and what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_trqam.data.frames import FrameObservation
from vla_trqam.methods.base import MethodConfig, Rehearsal
from vla_trqam.preflight.live_bytes import LiveBytes
from vla_trqam.preflight.model import device_of, prepared, repeated, seeded
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

ADAM_STATES = 2
CONTEXTS = 2
"""Prefixes held in one update: of s_t and of s_{t+n}, where its action is drawn there."""
BESIDE_RECORDED = 0.5
"""Of the activations, as measured at full size: see benchmarks/README.md."""
TEMPORARIES = 2
"""What a pass frees on its way is not counted: on a small pi0 the peak was 0.9 to 1.8 times the
estimate."""
CLOSE = "this is close: what a pass frees on its way can double it"


def check_parameters(policy: LeRobotFlowPolicy) -> Finding:
    """Something is trained, and with adapters nothing exists twice."""
    trained, everything = list(policy.trainable_parameters()), list(policy.model.parameters())
    own = {p.untyped_storage().data_ptr() for p in everything}
    copied = [p for p in policy.base.parameters() if p.untyped_storage().data_ptr() not in own]
    found = (
        f"{'adapters' if policy.has_adapters else 'expert in full'}: "
        f"{count(trained):,} trained ({in_words(tensor_bytes(trained))}), "
        f"{count(everything) - count(trained):,} frozen "
        f"({in_words(tensor_bytes(everything) - tensor_bytes(trained))}), "
        f"{count(copied):,} copied for the base ({in_words(tensor_bytes(copied))})"
    )
    low = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if low:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
        found += f"; trained as they are, in {names}, in which a small step rounds to none"
    if not trained:
        return Finding.failure("parameters", found, "adapters or an expert that are trained")
    if policy.has_adapters and copied:
        return Finding.failure(
            "parameters", found, "no copy: the base is the adapters switched off"
        )
    return Finding("parameters", found)


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in these tensors; what is tied counts once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _single_bytes(tensors: Iterable[Tensor]) -> int:
    """Of copies in float32 or what is finer."""
    return sum(t.numel() * max(t.element_size(), torch.float32.itemsize) for t in tensors)


def module_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    return tensor_bytes(chain(*((*m.parameters(), *m.buffers()) for m in modules)))


def in_words(number: float) -> str:
    """Bytes, for a reader."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Attributes:
        weights: the policy's, a base's copy among them, and the critic's; they lie there already.
        gradients: of what is trained.
        optimizer: Adam's two moments.
        activations: what one update's path keeps for gradients at a time, for one sample.
        copies: what it keeps besides whatever the samples, copies of weights in bfloat16.
        prefix: one encoded observation.
        next_actions: the chunks kept at every frame that the replay has room for.
        average: the running mean of what is trained of the policy; 0 without one.
        contexts: prefixes held of each row.
        shards: that the optimizer's moments are in; a process has one.
        encoding: what the prefix's pass takes and frees, of as many observations as go through it
            together.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    prefix: int
    next_actions: int = 0
    average: int = 0
    contexts: int = CONTEXTS
    shards: int = 1
    copies: int = 0
    encoding: int = 0

    @property
    def own_moments(self) -> int:
        """Adam's in one process."""
        return -(-self.optimizer // self.shards)

    @property
    def fixed(self) -> int:
        """What comes on top of the weights, whatever the batch."""
        # The weights in training wait in a copy while the average acts.
        at_rest = self.gradients + self.own_moments + self.next_actions
        return at_rest + 2 * self.average + self.copies

    @property
    def prefixes(self) -> int:
        """What each row of a batch brings along."""
        return self.contexts * self.prefix

    def recordings(self, share: Share) -> int:
        """What evaluations that are recorded keep besides (``policy.cuda_graphs``).

        Sums of gradients and one evaluation's own, prefixes where the recordings read them: of both
        fields and of next actions, and of these for the whole batch. Activations stay from one
        update to the next, so that all else an update needs comes on top of them:
        :data:`BESIDE_RECORDED` of them at most where it was measured.
        """
        if not share.recorded:
            return 0
        beside = BESIDE_RECORDED * share.rows_at_once * self.activations
        prefixes = (3 * share.rows_at_once + share.rows) * self.prefix
        return 2 * self.gradients + prefixes + round(beside)

    def beyond_activations(self, share: Share) -> int:
        """What the prefix's pass takes of memory that the path's activations do not take later.

        It is over when they begin; recorded ones are there all the time.
        """
        path = 0 if share.recorded else share.rows_at_once * self.activations
        return max(0, self.encoding - path)

    def of(self, share: Share) -> int:
        """What an update adds to the weights, in one process."""
        rows = share.rows * self.prefixes + share.rows_at_once * self.activations
        return self.fixed + rows + self.beyond_activations(share) + self.recordings(share)


@dataclass(frozen=True)
class Share:
    """This process's part of an update.

    Attributes:
        rows: of the batch.
        micro_batches: that they are taken in, one after the other.
        processes: of the run.
        shards: that the optimizer's state is in, one of them this process's.
        recorded: its evaluations of the fields are recorded and replayed.
    """

    rows: int
    micro_batches: int = 1
    processes: int = 1
    shards: int = 1
    recorded: bool = False

    @property
    def rows_at_once(self) -> int:
        """Those of the largest micro-batch."""
        return -(-self.rows // self.micro_batches)


@dataclass(frozen=True)
class DryPass:
    """One forward and backward pass of both fields along a path, with one sample.

    Attributes:
        prefix: bytes of the encoded observation.
        activations: bytes that the path keeps of a sample for gradients at a time: of all flow
            steps, or of one where they are computed again.
        reached: trained tensors that get a gradient; None where the method trains none.
        finite: whether all of them are.
        copies: bytes that it keeps whatever the samples: with autocast every evaluation that has a
            gradient keeps weights of a finer type in bfloat16.
        encoding: bytes of the prefix's pass beyond its result, of as many observations as go
            through it together.
    """

    prefix: int
    activations: int
    reached: int | None
    finite: bool
    copies: int = 0
    encoding: int = 0


def dry_pass(
    policy: LeRobotFlowPolicy,
    seen: FrameObservation,
    method: MethodConfig,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> DryPass:
    """Takes it with one raw observation; no gradient stays on the parameters.

    Args:
        policy: on its device.
        seen: the observation (B = 1).
        method: whose path it is.
        precision: what the run's evaluations are made in.
    """
    observation = prepared(policy, seen)
    with precision():
        prefix, encoding = _encoded(policy, seen)
        rehearsal, kept = _rehearsed(policy, observation, method, 1)
        if rehearsal is None:
            return DryPass(prefix, activations=0, reached=None, finite=True, encoding=encoding)
        each, copies = kept, 0
        if torch.is_autocast_enabled(device_of(policy).type):
            twice = prepared(policy, repeated(seen, 2))
            each = _rehearsed(policy, twice, method, 2)[1] - kept
            copies = max(0, kept - each)
    loss = rehearsal.values.square().sum()
    trained = list(policy.trainable_parameters())
    found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else ()
    gradients = [gradient for gradient in found if gradient is not None]
    return DryPass(
        prefix=prefix,
        activations=-(-each // rehearsal.parts),
        reached=len(gradients),
        finite=all(bool(torch.isfinite(gradient).all()) for gradient in gradients),
        copies=-(-copies // rehearsal.parts),
        encoding=encoding,
    )


def _encoded(policy: LeRobotFlowPolicy, seen: FrameObservation) -> tuple[int, int]:
    """Bytes of one prefix, and of the pass beyond the result of a larger batch."""
    rows = policy.encoded_at_once
    several = repeated(seen, rows)
    with LiveBytes() as live:
        made = policy.packed(several)
    return tensor_bytes(made.values()) // rows, live.peak


def _rehearsed(
    policy: LeRobotFlowPolicy, observation: dict[str, Any], method: MethodConfig, rows: int
) -> tuple[Rehearsal | None, int]:
    """The pass, and the bytes that it keeps."""
    context = policy.encode(observation)
    not_counted = {t.untyped_storage().data_ptr() for t in policy.parameters()}
    with saved_bytes(not_counted) as saved, seeded(device_of(policy)):
        rehearsal = method.rehearse(policy, context, rows)
    return rehearsal, sum(saved.values())


def check_gradient(dry: DryPass, policy: LeRobotFlowPolicy) -> Finding:
    """The loss moves what is trained."""
    if dry.reached is None:
        return Finding("gradient", "the method leaves the policy's weights as they are")
    wanted = len(list(policy.trainable_parameters()))
    found = f"the tuned field's gradient reaches {dry.reached} of {wanted} trained tensors"
    if dry.reached and dry.finite:
        return Finding("gradient", found)
    found += "" if dry.finite else ", where it is not finite"
    return Finding.failure("gradient", found, "finite gradients for adapters or expert")


def measure_memory(
    policy: LeRobotFlowPolicy,
    critic: nn.Module | None,
    dry: DryPass,
    next_actions: int = 0,
    *,
    averages: bool = False,
    contexts: int = CONTEXTS,
    shards: int = 1,
) -> Memory:
    """By part; the critic's activations and what the path frees on its way are not counted.

    Of weights in shards an update has all at hand, and their gradient; the optimizer's state alone
    stays in parts.
    """
    trained = [policy, *([] if critic is None else [critic])]
    gradients = tensor_bytes(p for m in trained for p in m.parameters() if p.requires_grad)
    return Memory(
        weights=module_bytes(*trained),
        gradients=gradients,
        optimizer=ADAM_STATES * gradients,
        activations=dry.activations,
        copies=dry.copies,
        encoding=dry.encoding,
        prefix=dry.prefix,
        next_actions=next_actions,
        average=_single_bytes(policy.trainable_parameters()) if averages else 0,
        contexts=contexts,
        shards=shards,
    )


@contextmanager
def saved_bytes(not_counted: set[int]) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps from inside the block: address -> bytes."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def check_memory(memory: Memory, available: int | None, share: Share, device: str) -> Finding:
    """An update's needs against what is free; None where that is not known.

    The processes of a run share a CPU's memory; an accelerator has each to itself.
    """
    sharing = share.processes if device == "cpu" else 1
    needed = sharing * memory.of(share)
    parts = {
        "gradients": memory.gradients,
        "optimizer": memory.own_moments,
        "next actions": memory.next_actions,
        **({"average": 2 * memory.average} if memory.average else {}),
        **({"weights in bfloat16": memory.copies} if memory.copies else {}),
        f"activations of {share.rows_at_once}": share.rows_at_once * memory.activations,
        f"prefixes of {share.rows}": share.rows * memory.prefixes,
        **({"their pass": beyond} if (beyond := memory.beyond_activations(share)) else {}),
        **({"recordings": memory.recordings(share)} if share.recorded else {}),
    }
    found = (
        f"weights {in_words(memory.weights)} are there; to come: "
        + ", ".join(f"{name} {in_words(part)}" for name, part in parts.items())
        + (f", times {sharing} processes" if sharing > 1 else "")
        + f": {in_words(needed)} in all; "
    )
    if available is None:
        return Finding("memory", f"{found}what is free on {device} is not known")
    found += f"{in_words(available)} free on {device}"
    if needed <= available:
        close = available < TEMPORARIES * needed
        return Finding("memory", found + (f"; {CLOSE}" if close else ""))
    return Finding.failure("memory", found, _smaller(memory, available // sharing, share))


def _smaller(memory: Memory, room: int, share: Share) -> str:
    """Settings that fit the room of one process: smaller parts of the batch, or a smaller batch."""
    parts = range(share.micro_batches + 1, share.rows + 1)
    fitting = (m for m in parts if memory.of(replace(share, micro_batches=m)) <= room)
    if (enough := next(fitting, None)) is not None:
        return f"--micro_batches={enough} or more"
    one, two = (memory.of(replace(share, rows=n, micro_batches=n)) for n in (1, 2))
    rows = (room - one) // max(two - one, 1) + 1
    if rows >= 1:
        return f"--batch_size={rows * share.processes} --micro_batches={rows}"
    if 2 * memory.next_actions > memory.fixed:
        return "fewer --critic.next_actions, or fewer --dataset.episodes"
    return "adapters instead of full training, or a larger device"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + idle)
    if device.type != "cpu":
        return None
    limits = [_meminfo(Path("/proc/meminfo")), _cgroup_room(Path("/sys/fs/cgroup"))]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _meminfo(path: Path) -> int | None:
    """`MemAvailable` in bytes."""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room(folder: Path) -> int | None:
    """What a container's limit leaves; files that the system can drop count as free."""
    limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file() and stat.is_file()):
        return None
    if limit.read_text().strip() == "max":
        return None
    droppable = dict(line.split() for line in stat.read_text().splitlines())
    cached = int(droppable.get("inactive_file", 0)) + int(droppable.get("active_file", 0))
    return int(limit.read_text()) - int(used.read_text()) + cached

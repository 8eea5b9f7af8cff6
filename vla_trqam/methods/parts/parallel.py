"""One update over several processes (ranks), each with its share of the batch.

Weights, optimizer and lambda are the same on every rank; what differs is the data. A rank's losses
are means over its own rows, and the ranks may have different numbers of them, so a loss is weighed
by its share of all rows (:meth:`Ranks.shares`): the average of the gradients over ranks is then the
gradient of the mean over the joint batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.precision import networks_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET = 2**25
"""Numbers that are sent at once."""

SHARD_DTYPES = (
    "the weights to shard are of {}; sharding needs one dtype: load the policy in float32"
)


class Ranks:
    """The processes of a run, or the only one.

    Args:
        accelerator: of ``accelerate``; None for a single process in full precision.
        shard: keep only a part of the trained weights, their gradients and the optimizer's state on
            every rank (FSDP), not a copy of all.

    Raises:
        UserError: the accelerator asks for what is not supported here.
    """

    def __init__(self, accelerator: Accelerator | None = None, *, shard: bool = False) -> None:
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.shard = shard
        self._device = torch.device("cpu") if accelerator is None else accelerator.device
        self._precision = "no" if accelerator is None else str(accelerator.mixed_precision)
        if accelerator is not None:
            check_accelerator(accelerator)
        if shard:
            check_several(self.count)

    def autocast(self) -> AbstractContextManager[object]:
        """The networks' precision: bfloat16 where the accelerator says so."""
        return networks_precision(self._precision, self._device)

    def synchronize(self, module: nn.Module) -> None:
        """Gives every rank the weights and buffers of rank 0."""
        if self.count == 1:
            return
        for tensor in [*module.parameters(), *module.buffers()]:
            # NCCL sends from its own device only, and a small buffer may lie on the host.
            sent = tensor.detach().to(self._device)
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages over ranks what the backward passes left; sharded gradients are averaged there.

        Not by ``DistributedDataParallel``, which sends while the backward pass runs: that pass is a
        small part of an update here, while the updates of the critic alone, of the whole and in
        micro-batches each touch other weights, of which it would have to be told.
        """
        if self.count == 1 or self.shard:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.div_(self.count).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def sharded(
        self, module: nn.Module, fixed: set[nn.Parameter], forwards: Mapping[str, type]
    ) -> None:
        """Leaves every rank a part of the module's weights but the fixed ones; those of rank 0.

        Args:
            module: is changed in place; only inside :func:`whole` and its own forward passes are
                the weights there.
            fixed: stay whole.
            forwards: its forward methods, each with the dataclass that it returns.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        dtypes = {p.dtype for p in module.parameters() if p not in fixed}
        if len(dtypes) != 1:
            raise UserError(SHARD_DTYPES.format(" and ".join(sorted(map(str, dtypes)))))
        self.synchronize(module)
        mesh = init_device_mesh(self._device.type, (self.count,))
        # One group: the fields are evaluated part by part and many times within a forward pass, so
        # that gathering layer by layer would do it anew each time, and miss the parts.
        fully_shard(module, mesh=mesh, ignored_params=fixed)
        for name, output in forwards.items():
            if name != "forward":  # which FSDP knows
                register_fsdp_forward_method(module, name)
            _show_tensors(output)

    def reduce_after(self, module: nn.Module, *, last: bool) -> None:
        """Lets the gradients of a sharded module wait for the last micro-batch."""
        if self.shard:
            module.set_requires_gradient_sync(last)  # type: ignore[operator]

    def shares(self, sizes: Sequence[int]) -> list[float]:
        """The weight of each micro-batch's mean, so that the ranks' average is the joint mean.

        Args:
            sizes: rows of this rank's micro-batches.

        Returns:
            ``W B_i / sum B`` with W ranks and the sum over all micro-batches of all ranks.

        Raises:
            ValueError: the weights are sharded, which makes the ranks go in step, and they do not
                have equally many micro-batches.
        """
        total = sum(sizes)
        if self.count > 1:
            found = self._gathered([total, len(sizes)])
            if self.shard and len({number for _, number in found}) != 1:
                raise ValueError(f"the ranks have {[int(n) for _, n in found]} micro-batches")
            total = int(sum(rows for rows, _ in found))
        return [self.count * size / total for size in sizes]

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return flag if self.count == 1 else any(value for (value,) in self._gathered([flag]))

    def mean(self, values: Sequence[float]) -> list[float]:
        """The average over ranks, the same to the bit on all of them."""
        if self.count == 1:
            return list(values)
        # All ranks add up in the same order.
        return [sum(column) / self.count for column in zip(*self._gathered(values), strict=True)]

    def mean_of(
        self, parts: Sequence[Mapping[str, float]], shares: Sequence[float]
    ) -> dict[str, float]:
        """The mean over the joint batch of what was averaged over micro-batches."""
        names = list(parts[0])
        sums = [sum(w * p[name] for w, p in zip(shares, parts, strict=True)) for name in names]
        return dict(zip(names, self.mean(sums), strict=True))

    def _gathered(self, values: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return [tensor.tolist() for tensor in found]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The weights of a sharded module are all there inside, to be read; every rank must enter."""
    shards = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if _is_shard(parameter)
    ]
    for owner, name, shard in shards:
        full = nn.Parameter(whole_tensor(shard.detach()), requires_grad=shard.requires_grad)
        owner._parameters[name] = full
    try:
        yield
    finally:
        for owner, name, shard in shards:
            owner._parameters[name] = shard


@contextmanager
def whole_moments(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The same for the optimizer's state."""
    shards = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    for state in optimizer.state.values():
        state.update({key: whole_tensor(value) for key, value in state.items()})
    try:
        yield
    finally:
        optimizer.state.update(shards)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, or the tensor itself; every rank must ask."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    found = gather()
    # Of unequal parts it is a view of a larger buffer, which safetensors refuses to write.
    exact = found.untyped_storage().nbytes() == found.nbytes
    return found if exact else found.clone()


def shard_like(shard: Tensor, tensor: Tensor) -> Tensor:
    """The reverse: a whole tensor in shards as another one's, or the tensor itself.

    Every process has read it, so each takes its own part and asks no other: one that fails on the
    way leaves none waiting.
    """
    if not _is_shard(shard):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(shard, DTensor)
    return distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def clipped(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradient's global norm, over all shards; returns the norm before."""
    return whole_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype each, together not much larger than the largest of them."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        for gradient in (g for g in gradients if g.dtype == dtype):
            if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(gradient)
        yield bucket


@cache
def _show_tensors(output: type) -> None:
    """Lets FSDP find the loss in what a forward pass returned."""
    from torch.export import register_dataclass

    register_dataclass(output)


def check_several(count: int) -> None:
    """Refuses to keep weights in parts where there is one process.

    Raises:
        UserError: so it is.
    """
    if count == 1:
        raise UserError(
            "there is one process only; sharding (--peft.shard=true) needs more: see "
            "docs/distributed.md for how to launch them"
        )


def check_accelerator(accelerator: Any) -> None:
    """Refuses what an accelerator may ask and the update cannot do.

    Raises:
        UserError: another precision than float32 and bfloat16, or a sharding of its own.
    """
    precision, kind = str(accelerator.mixed_precision), accelerator.distributed_type.value
    if precision not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision is {precision!r}; fine-tuning runs in 'bf16', or in full precision "
            "with 'no'"
        )
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP"):
        raise UserError(
            f"accelerate is set to {kind}; launch with plain processes (--multi_gpu), the sharding "
            "of the trained weights is a setting of the method"
        )

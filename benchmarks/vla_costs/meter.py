"""Meters of one training step: seconds by part, floating-point work by part, bytes alive."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock beside it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Parts:
    """What every part of a step took, in the unit of a reading.

    A part inside another one counts for the inner one alone.

    Args:
        read: the meter, which only grows.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._open: list[str] = []
        self._last = 0.0
        self.spent: defaultdict[str, float] = defaultdict(float)

    def _settle(self) -> None:
        now = self._read()
        if self._open:
            self.spent[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts what happens inside."""
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def metered(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.of(part):
                return call(*args, **kwargs)

        return counted


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, the device's work included."""

    def read() -> float:
        synchronise(device)
        return time.perf_counter()

    return read


@contextmanager
def counting_work() -> Iterator[Callable[[], float]]:
    """A meter of floating-point operations in matrix products, forward and backward.

    Multiplications and additions count one each; everything elementwise is left out. Fused
    attention, which the counter does not know on every device, is taken apart.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield lambda: float(counter.get_total_flops())


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside the context and still alive, on whatever device.

    Exact for what operations return (activations, gradients, optimiser state) at every operation;
    scratch memory inside an operation is not seen. It works without memory (device ``meta``) too.

    Attributes:
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts what the operation returned."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            self._ignore(value)
        for value in tree_leaves(out):
            self._add(value)
        return out

    def _ignore(self, value: Any) -> None:
        """What existed before is not counted when a view of it is returned."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = 0
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)

    def _add(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = storage.nbytes()
        self._alive[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step needs beyond what is there before it.

    On CUDA ``max_memory_allocated``; elsewhere :class:`LiveBytes`.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        step()
    return live.peak


def peak_bytes_prepared(step: Callable[[], object], device: torch.device) -> int:
    """:func:`peak_bytes` of a step whose first call keeps memory for the later ones.

    On CUDA graphs write where memory is no longer allocated as torch counts it: their pools count
    whole.
    """
    if device.type != "cuda":
        step()
        return peak_bytes(step, device)
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronise(device)
    pools = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)]
    idle = sum(s["total_size"] - s["allocated_size"] for s in pools)
    kept = torch.cuda.memory_allocated(device) - before
    return kept + idle + peak_bytes(step, device)

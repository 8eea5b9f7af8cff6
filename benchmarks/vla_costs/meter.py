"""Meters of one training step: seconds by part, floating-point work by part, bytes alive."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vla_trqam.preflight.live_bytes import LiveBytes


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

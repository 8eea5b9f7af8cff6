"""A run in several processes: who writes, who draws what, and what every process must know.

The update itself is :class:`~vla_trqam.methods.trqam.TRQAM`'s business, which takes the same
accelerator. Nothing that travels between processes is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from vla_trqam.engine.processes.generators import Generators
from vla_trqam.errors import UserError
from vla_trqam.launched import launched_processes
from vla_trqam.precision import networks_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_WAIT = timedelta(hours=12)
"""Of the other processes, while one rolls out or writes."""


class FailedElsewhereError(UserError):
    """Another process of the run failed; the main one tells the user."""


def make_accelerator(*, cpu: bool = False, bfloat16: bool = False) -> Accelerator:
    """The accelerator of a run: one process, or those that ``accelerate launch`` started.

    Args:
        cpu: stay on the CPU, as several processes on a machine without accelerator do anyway.
        bfloat16: networks compute in bfloat16; otherwise as ``accelerate launch`` was told.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(
        # accelerate would take each of several processes on a CPU for a run of its own.
        cpu=cpu or (launched_processes() > 1 and not torch.accelerator.is_available()),
        mixed_precision="bf16" if bfloat16 else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


class Team:
    """This process among those of its run.

    Args:
        accelerator: of the run; None for a single process.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.size = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.precision = "no" if accelerator is None else str(accelerator.mixed_precision)
        self._device = torch.device("cpu") if accelerator is None else accelerator.device

    def autocast(self) -> AbstractContextManager[object]:
        """The networks' precision, for what computes outside of an update as well."""
        return networks_precision(self.precision, self._device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def generators(self, seed: int, device: torch.device) -> Generators:
        """Different random numbers on every rank; rank 0 has those of a run of its own."""
        if self.is_main:
            return Generators.seeded(seed, device)
        replay, noise = np.random.SeedSequence([seed, self.rank]).spawn(2)
        own = int(noise.generate_state(1, np.uint64)[0])
        # torch takes signed seeds.
        generator = torch.Generator(device).manual_seed(own >> 1)
        return Generators(np.random.default_rng(replay), generator)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every ``size``-th item from this rank's on, of a list that all ranks have."""
        return list(items[self.rank :: self.size])

    def batch_share(self, batch_size: int) -> int:
        """Rows of this rank's part of a batch; the first ranks take what does not divide.

        Raises:
            UserError: there is less than one row a process.
        """
        if batch_size < self.size:
            raise UserError(
                f"--batch_size={batch_size} is the size of the whole batch; for {self.size} "
                f"processes it must be at least {self.size}"
            )
        return batch_size // self.size + (self.rank < batch_size % self.size)

    def fraction_share(self, fraction: float, batch_size: int) -> float:
        """The fraction of this rank's rows with which all ranks' are that of the whole batch.

        The whole batch's number of rows is rounded once and dealt out evenly: rounded by each rank,
        a tenth of four rows would be none of any.
        """
        wanted = round(batch_size * fraction)
        rows = self.batch_share(batch_size)
        start = self.rank * (batch_size // self.size) + min(self.rank, batch_size % self.size)
        own = (start + rows) * wanted // batch_size - start * wanted // batch_size
        return own / rows

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order; anything that JSON can hold."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths)
        own = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=self._device)
        own[: len(data)] = data.to(self._device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        pairs = zip(found, lengths.tolist(), strict=True)
        return [json.loads(bytes(tensor[:length].tolist())) for tensor, length in pairs]

    def gather_shares(self, items: Sequence[Any]) -> list[Any]:
        """The reverse of :meth:`share`: every rank's items back in the list's order."""
        parts = self.gather(list(items))
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What the main process's work returned (JSON), on every rank; the others wait for it.

        Raises:
            UserError: on the other ranks, where the work failed on the main one, with its sentence;
                the main process raises the error itself. None is left waiting.
        """
        if not self.is_main:
            return self._outcome(None)
        try:
            result = work()
        except BaseException as error:
            self._outcome({"error": str(error) or type(error).__name__})
            raise
        return self._outcome({"result": result})

    def together(self, work: Callable[[], Result]) -> Result:
        """What this process's work returned; every rank has work of its own, and all end it.

        Raises:
            UserError: it failed on some rank: on the main process with the first one's sentence.
                What is no mistake of the user's is raised by the rank that it befell, as it is.
        """
        if self.size == 1:
            return work()
        result, sentence, failure = None, None, None
        try:
            result = work()
        except UserError as error:
            sentence = str(error)
        except Exception as error:
            failure = error
        told = self.gather([sentence, failure is not None])
        if failure is not None:
            raise failure
        for rank, (text, _) in enumerate(told):
            if text is not None:
                where = f"process {rank}: " if rank else ""
                raise (UserError if self.is_main else FailedElsewhereError)(where + text)
        if any(failed for _, failed in told):
            raise FailedElsewhereError("another process of the run failed")
        return cast(Result, result)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32, device=self._device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def _outcome(self, value: dict[str, Any] | None) -> Any:
        outcome = self.gather(value)[0]
        if "error" in outcome:
            if self.is_main:
                return None
            raise FailedElsewhereError(outcome["error"])
        return outcome["result"]

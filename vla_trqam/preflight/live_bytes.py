"""Bytes that a computation needs, counted tensor by tensor on whatever device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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

"""How a policy's fields are evaluated at given observations: as they are, compiled, or replayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from vla_trqam.adapters.families.base import FlowFamily
from vla_trqam.adapters.fields.base_field import BaseField
from vla_trqam.adapters.fields.field_graphs import CUDARecorder, Evaluate, FieldGraphs, Recorder

Field = Literal["tuned", "base", "next"]
"""Whose evaluations: both fields along a path, and the tuned one without gradient beside it."""
FieldAt = Callable[[Tensor, Tensor], Tensor]
"""``v(x, tau)`` at given observations: x (B, H, A), tau (1,) -> (B, H, A), float32."""


class Evaluations:
    """What one path's evaluations share is computed once; how each is made, this decides.

    Args:
        family: of the policy.
        host: the policy with the tuned field's weights.
        base: where its base field is.
        trained: weights of the tuned field.
    """

    def __init__(
        self,
        family: FlowFamily,
        host: PreTrainedPolicy,
        base: BaseField,
        trained: Iterable[nn.Parameter],
    ) -> None:
        self._family, self._trained = family, tuple(trained)
        self._host, self._base = host, base
        self._compiled: Evaluate | None = None
        self._graphs: FieldGraphs | None = None
        self._rows: frozenset[int] = frozenset()

    def compile(self, backend: str = "inductor") -> None:
        """From now on they are compiled, each kind when it is met.

        Args:
            backend: of ``torch.compile``.
        """
        # One graph a shape: a path's batches are alike, and sizes that vary cost speed.
        self._compiled = torch.compile(self._family.velocities, backend=backend, dynamic=False)

    def record(self, rows: Collection[int], recorder: Recorder | None = None) -> None:
        """From now on each is recorded when it is met, and replayed when it is met again.

        Args:
            rows: numbers of observations at which a sampler is replayed too; each is recorded for
                itself. What is known of an update and not what has been met, so that a run that
                goes on samples as before.
            recorder: None for CUDA graphs.
        """
        self._rows = frozenset(rows)
        recorder = recorder or CUDARecorder(next(self._host.parameters()).device)
        self._graphs = FieldGraphs(self._velocities, self._trained, recorder)

    def _velocities(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        return (self._compiled or self._family.velocities)(host, x, tau, shared)

    def _host_of(self, field: Field) -> AbstractContextManager[PreTrainedPolicy]:
        return self._base.host() if field == "base" else nullcontext(self._host)

    def begin_path(self) -> None:
        """The path before has given its gradients, or will not be asked for any."""
        if self._graphs is not None:
            self._graphs.begin_path()

    def at(self, field: Field, condition: Any) -> FieldAt:
        """One field at observations of this condition."""
        make = partial(self._host_of, field)
        with make() as host:
            shared = self._family.share(host, condition, 1)
        if self._graphs is not None:
            return self._graphs.field(field, make, shared)

        def evaluate(x: Tensor, tau: Tensor) -> Tensor:
            with make() as host:
                return self._velocities(host, x.unsqueeze(1), tau, shared).squeeze(1).float()

        return evaluate

    def replayed(self, condition: Any, rows: int) -> FieldAt | None:
        """The tuned field without gradient at so many observations; None if not replayed."""
        if self._graphs is None or rows not in self._rows or torch.is_grad_enabled():
            return None
        return self.at("next", condition)

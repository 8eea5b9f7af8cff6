"""A LeRobot policy's fields along one path, what its evaluations share computed once.

What every evaluation would compute again of an observation (masks, rotations by position,
projections of the prefix) is computed once a path and field.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from vla_trqam.adapters.base_field import BaseField
from vla_trqam.adapters.flow_family import FlowFamily

from vla_trqam.policy import FlowPolicy, PathFields


class LeRobotPathFields(PathFields):
    """See :class:`~vla_trqam.policy.PathFields`.

    Args:
        policy: whose fields.
        host: the policy with its tuned weights.
        base: gives the policy with its base weights.
        family: how to ask both.
        condition: of the path's observations.
        next_condition: of those whose next action is sampled beside the path.
        keep_activations: see :class:`~vla_trqam.policy.PathFields`.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        host: PreTrainedPolicy,
        base: BaseField,
        family: FlowFamily,
        condition: Any,
        next_condition: Any,
        *,
        keep_activations: bool = True,
    ) -> None:
        super().__init__(policy, condition, next_condition, keep_activations=keep_activations)
        self._host, self._base_field, self._family = host, base, family
        # With a graph: some families' projections of the prefix are trained.
        with torch.enable_grad():
            self._tuned_shared = family.share(host, condition, 1)
        with torch.no_grad():
            self._next_shared = family.share(host, next_condition, 1)
            with self._base_host() as base_host:
                self._base_shared = family.share(base_host, condition, 1)

    def _base_host(self) -> AbstractContextManager[PreTrainedPolicy]:
        return self._base_field.host()

    def _tuned_value(self, x: Tensor, tau: float) -> Tensor:
        return self._at(self._host, x, tau, self._tuned_shared)

    def _next_value(self, x: Tensor, tau: float) -> Tensor:
        return self._at(self._host, x, tau, self._next_shared)

    def _base_value(self, x: Tensor, tau: float) -> Tensor:
        with self._base_host() as base_host:
            return self._at(base_host, x, tau, self._base_shared)

    def _at(self, host: PreTrainedPolicy, x: Tensor, tau: float, shared: Any) -> Tensor:
        """One point of every row: (B, H, A) -> (B, H, A)."""
        time = torch.full((1,), tau, dtype=x.dtype, device=x.device)
        return self._family.velocities(host, x.unsqueeze(1), time, shared).squeeze(1).float()

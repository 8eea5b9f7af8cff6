"""A LeRobot policy's fields along one path, what its evaluations share computed once.

What every evaluation would compute again of an observation (masks, rotations by position,
projections of the prefix) is computed once a path and field.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from vla_trqam.policy import PathFields

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import Encoding, LeRobotFlowPolicy


class LeRobotPathFields(PathFields):
    """See :class:`~vla_trqam.policy.PathFields`."""

    def __init__(
        self,
        policy: LeRobotFlowPolicy,
        context: Encoding,
        next_context: Encoding,
        *,
        keep_activations: bool = True,
    ) -> None:
        super().__init__(policy, context, next_context, keep_activations=keep_activations)
        self._host, self._base_host, self._family = policy.host, policy.base.host, policy.family
        self._velocities_at = policy.velocities_at
        family, condition = policy.family, context.condition
        # With a graph: some families' projections of the prefix are trained.
        with torch.enable_grad():
            self._tuned_shared = family.share(self._host, condition, 1)
        with torch.no_grad(), self._base_host() as base_host:
            self._base_shared = family.share(base_host, condition, 1)
        self._next_condition = next_context.condition

    @cached_property
    @torch.no_grad()
    def _next_shared(self) -> Any:
        """Made when a next action is sampled: where it is not, the context may have no prefix."""
        return self._family.share(self._host, self._next_condition, 1)

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
        return self._velocities_at(host, x.unsqueeze(1), time, shared).squeeze(1).float()

"""A LeRobot policy's fields along one path, what its evaluations share computed once.

What every evaluation would compute again of an observation (masks, rotations by position,
projections of the prefix) is computed once a path and field.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vla_trqam.adapters.fields.evaluations import FieldAt

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
        self._evaluations = policy.evaluations
        self._evaluations.begin_path()
        # With a graph: some families' projections of the prefix are trained.
        with torch.enable_grad():
            self._tuned_at = self._evaluations.at("tuned", context.condition)
        with torch.no_grad():
            self._base_at = self._evaluations.at("base", context.condition)
        self._next_condition = next_context.condition

    @cached_property
    @torch.no_grad()
    def _next_at(self) -> FieldAt:
        """Made when a next action is sampled: where it is not, the context may have no prefix."""
        return self._evaluations.at("next", self._next_condition)

    def _tuned_value(self, x: Tensor, tau: float) -> Tensor:
        return self._tuned_at(x, _time(x, tau))

    def _next_value(self, x: Tensor, tau: float) -> Tensor:
        return self._next_at(x, _time(x, tau))

    def _base_value(self, x: Tensor, tau: float) -> Tensor:
        return self._base_at(x, _time(x, tau))


def _time(x: Tensor, tau: float) -> Tensor:
    return torch.full((1,), tau, dtype=x.dtype, device=x.device)

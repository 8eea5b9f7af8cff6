"""A LeRobot policy's fields along one path, in few and large calls.

The plain :class:`~vla_trqam.policy.PathFields` evaluates every field at every point where it is
needed. Small evaluations are bound by the number of operations and not by the work in them, so
here the path and the next action's ODE advance in one call, and both fields at all K points of the
path are one call each. What every evaluation would compute again of an observation (masks,
rotations by position, projections of the prefix) is computed once a path.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from vla_trqam.adapters.base_field import BaseField
from vla_trqam.adapters.flow_family import FlowFamily

from vla_trqam.policy import PathFields


class LeRobotPathFields(PathFields):
    """See :class:`~vla_trqam.policy.PathFields`.

    Args:
        host: the policy with its tuned weights.
        base: gives the policy with its base weights.
        family: how to ask both.
        condition: of the path's observations.
        next_condition: of those whose next action is sampled beside the path.
    """

    def __init__(
        self,
        host: PreTrainedPolicy,
        base: BaseField,
        family: FlowFamily,
        condition: Any,
        next_condition: Any,
    ) -> None:
        self._host, self._base_field, self._family = host, base, family
        self._condition = condition
        self._points: list[tuple[Tensor, float]] = []
        self._times: list[float] = []
        with torch.no_grad():
            joined = family.join(condition, next_condition)
            self._both = family.share(host, joined, 1)
            with self._base_host() as base_host:
                self._one = family.share(base_host, condition, 1)

    def _base_host(self) -> AbstractContextManager[PreTrainedPolicy]:
        return self._base_field.host()

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, next_x: Tensor, tau: float, adjoint_tau: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`PathFields.evaluate`."""
        tuned, following = self._at(self._host, torch.cat([x, next_x]), tau, self._both).chunk(2)
        with self._base_host() as base_host:
            base = self._at(base_host, x, tau, self._one)
        self._points.append((x, adjoint_tau))
        self._times.append(tau)
        return tuned, base, following

    def tuned(self) -> Tensor:
        """See :meth:`PathFields.tuned`."""
        with torch.enable_grad():
            return self._along_path(self._host)

    def base(self) -> Tensor:
        """See :meth:`PathFields.base`.

        The values of :meth:`evaluate` differ from these in the last bits; fields that are equal
        have a KL of exactly 0 only where both are computed in the same call.
        """
        with torch.no_grad(), self._base_host() as base_host:
            return self._along_path(base_host)

    def base_pullback(self, step: int, cotangent: Tensor) -> Tensor:
        """See :meth:`PathFields.base_pullback`."""
        x, tau = self._points[step]
        with torch.enable_grad(), self._base_host() as base_host:
            point = x.detach().requires_grad_(True)
            value = self._at(base_host, point, tau, self._one)
        (gradient,) = torch.autograd.grad(value, point, cotangent)
        return gradient

    def _at(self, host: PreTrainedPolicy, x: Tensor, tau: float, shared: Any) -> Tensor:
        """One point of every row: (B, H, A) -> (B, H, A)."""
        time = torch.full((1,), tau, dtype=x.dtype, device=x.device)
        return self._family.velocities(host, x.unsqueeze(1), time, shared).squeeze(1).float()

    def _along_path(self, host: PreTrainedPolicy) -> Tensor:
        """All points of the path: (K, B, H, A)."""
        states = torch.stack([x for x, _ in self._points], dim=1)
        times = torch.tensor(self._times, dtype=states.dtype, device=states.device)
        shared = self._family.share(host, self._condition, len(times))
        return self._family.velocities(host, states, times, shared).float().transpose(0, 1)

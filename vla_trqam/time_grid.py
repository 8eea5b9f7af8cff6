"""The flow's time grid and the memoryless noise scale.

The only file that knows what happens at ``tau = 0`` and ``tau = 1``. Time runs from noise
(``tau = 0``) to action (``tau = 1``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_trqam.errors import UserError

AdjointTime = Literal["next", "same"]


@dataclass(frozen=True)
class TimeGrid:
    r"""``tau_i = i h`` with ``h = 1/K``, and the memoryless noise scale on it.

    In continuous time ``g(tau)^2 = 2 (1 - tau) / tau`` (Adjoint Matching, eq. 22, for the linear
    path), singular at 0 and zero at 1. On the grid both ``tau`` and ``1 - tau`` grow by
    ``time_shift`` steps: ``g_i^2 = 2 (1 - tau_i + d) / (tau_i + d)`` with ``d = time_shift * h``,
    finite at 0. The authors' code uses ``time_shift = 1``; smaller values approach the text.

    Attributes:
        num_flow_steps: K, the number of steps from noise to action.
        time_shift: the shift ``d`` in units of h, in (0, 1].
    """

    num_flow_steps: int
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_flow_steps < 1:
            raise UserError(f"num_flow_steps is {self.num_flow_steps}; it must be at least 1")
        if not 0.0 < self.time_shift <= 1.0:
            raise UserError(f"time_shift is {self.time_shift}; it must be in (0, 1], in units of h")

    @property
    def step_size(self) -> float:
        """``h = 1 / K``."""
        return 1.0 / self.num_flow_steps

    def tau(self, step: int) -> float:
        """``tau_i`` for ``i`` in ``0..K``."""
        return step / self.num_flow_steps

    def shifted_tau(self, step: int) -> float:
        """``tau_i + d``, what the memoryless drift divides by."""
        return (step + self.time_shift) / self.num_flow_steps

    def noise_scale_squared(self, step: int) -> float:
        """``g_i^2``."""
        return (
            2.0 * (1.0 - self.tau(step) + self.time_shift * self.step_size) / self.shifted_tau(step)
        )

    def taus(self, like: Tensor) -> Tensor:
        """``tau_0 .. tau_{K-1}`` as a tensor (K,) of ``like``'s dtype and device."""
        return like.new_tensor([self.tau(i) for i in range(self.num_flow_steps)])

    def noise_scales_squared(self, like: Tensor) -> Tensor:
        """``g_0^2 .. g_{K-1}^2`` as a tensor (K,) of ``like``'s dtype and device."""
        return like.new_tensor([self.noise_scale_squared(i) for i in range(self.num_flow_steps)])


def adjoint_tau(grid: TimeGrid, step: int, adjoint_time: AdjointTime) -> float:
    """The time at which the adjoint asks for ``v_base`` at a step's state.

    ``"next"`` evaluates the base at ``(X_i, tau_{i+1})``, as the authors' code does; ``"same"`` at
    ``(X_i, tau_i)``, where the forward chain evaluates its field.
    """
    return grid.tau(step + 1 if adjoint_time == "next" else step)


def per_step(weights: Tensor, path: Tensor) -> Tensor:
    """Shapes one number a step (K,) to multiply a quantity along a path (K, B, H, A)."""
    assert weights.shape == path.shape[:1], (weights.shape, path.shape)
    return weights.view(-1, *[1] * (path.ndim - 1))


def full_tau(tau: float, x: Tensor) -> Tensor:
    """The same time for every sample of a batch: (B,) for ``x`` of (B, ...)."""
    return torch.full(x.shape[:1], tau, dtype=x.dtype, device=x.device)

r"""TRQAM with external KL, the ablation: the trust region as a penalty beside QAM's loss.

``L = L_QAM(beta = 1) + lambda D(theta)``. Chain, noise and adjoint are QAM's, lambda is a number
that TRQAM's dual moves, and ``D`` is the path KL in the budget's unit, whose gradient flows through
the tuned field. Every step's minimiser is ``v_tuned - v_base = -(2 V / B) a / (2 + c h lambda)``
with ``c = 1``, or ``1 / n`` where the KL is per action; TRQAM's own is ``-(V / B) a / lambda``.
So the penalty is TRQAM at the temperature ``1 + c h lambda / 2``: it can weaken QAM's correction
and never strengthen it, and lambda works in other units, ``2 / (c h)`` of them for one of TRQAM's.
At the authors' ``K = 10`` it takes ``lambda = 20`` to halve the correction (100 per action of a
chunk of 5), so that TRQAM's bracket and step would bind it by hand: this method has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.methods.parts.adjoint_matching import TRQAMLoss
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.methods.trqam_config import TRQAMConfig
from vla_trqam.trust_region import kl_penalty


@dataclass(frozen=True)
class ExternalKLConfig(TRQAMConfig):
    """Knobs of the external KL: those of TRQAM, with a dual for lambda's other units.

    Attributes:
        lam_init: the penalty's first weight; 20 halves QAM's correction at 10 flow steps, of a KL
            per chunk.
        lam_max: of the penalty's weight; far enough for a hundredth of the correction, at 10 flow
            steps and a KL per action of chunks up to 50.
        dual_step_size: of the penalty's weight, whose unit is some 2 K / c of TRQAM's.
    """

    lam_init: float = 20.0
    lam_max: float = 1e5
    dual_step_size: float = 1.0


class ExternalKLLoss(TRQAMLoss):
    """The penalty in place of lambda inside the regression."""

    config: ExternalKLConfig

    def matching(
        self, control_gap: Tensor, adjoint: Tensor, lam: float, weights: Tensor | None = None
    ) -> Tensor:
        """QAM's at beta = 1, and lambda times the path KL."""
        divisor = self.config.kl_divisor(self.policy.executed_length)
        penalty = lam * kl_penalty(control_gap, self.grid, weights) / divisor
        return adjoint_matching_loss(control_gap, adjoint, self.grid, 1.0, weights) + penalty


class ExternalKL(TRQAM):
    """See the module."""

    loss_class = ExternalKLLoss
    lambda_is = "the weight of a penalty"

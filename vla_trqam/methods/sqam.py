r"""SQAM: QAM with the adjoint in closed form, and a penalty on the critic at the policy's actions.

The adjoint is a scalar times the critic's slope, ``a_tau = -tau beta grad Q(s, X_1)``: no
vector-Jacobian product is taken (arXiv 2610.10437, known here by its abstract). Its penalty's form
and weight are not known: the one here, :func:`value_penalty`, is ours, and off by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from vla_trqam.adjoint import AdjointKind
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.parts.adjoint_matching import TRQAMLoss
from vla_trqam.methods.parts.off_policy import td_weight
from vla_trqam.methods.parts.results import CriticLossOutput
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.policy import Context


@dataclass(frozen=True)
class SQAMConfig(QAMConfig):
    """Knobs of SQAM: those of QAM, and the penalty's weight.

    Attributes:
        adjoint: "scalar", which SQAM's is.
        value_penalty: weight of the penalty on the critic's value at the policy's actions over that
            at the data's (ours); 0 for none.
    """

    adjoint: AdjointKind = "scalar"
    value_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjoint != "scalar":
            raise UserError(
                f"adjoint is {self.adjoint!r}, but SQAM's is 'scalar': leave it out, or take qam"
            )
        if not 0.0 <= self.value_penalty < math.inf:
            raise UserError(
                f"value_penalty is {self.value_penalty}; it must be finite and not negative"
            )


def value_penalty(q_policy: Tensor, q_data: Tensor, weight: Tensor) -> Tensor:
    """``mean_{e,b} w_b (Q_e(s'_b, a'_b) - Q_e(s_b, a_b))``, a' the policy's: a scalar.

    The form of CQL (Kumar et al., 2020) at the actions that the TD target needs anyway. What data
    and policy share cancels, so that it lowers no value as such.

    Args:
        q_policy: at the next observations and the policy's actions, (E, B).
        q_data: at the chunks of the data, (E, B).
        weight: of every row, (B,).
    """
    return ((q_policy - q_data) * weight).mean()


class SQAMLoss(TRQAMLoss):
    """QAM's, with the penalty beside the TD loss."""

    config: SQAMConfig

    def critic_terms(
        self,
        batch: TransitionBatch,
        features: Tensor,
        next_context: Context,
        next_action: Tensor | None,
    ) -> CriticLossOutput:
        """TD, and the penalty over chunks that count and after which something comes."""
        found = super().critic_terms(batch, features, next_context, next_action)
        if self.config.value_penalty == 0.0:
            return found
        assert next_action is not None
        policy, critic = self.policy, self.critic.online
        penalty = value_penalty(
            critic(policy.features(next_context), next_action),
            critic(features, policy.executed(batch.action, clip=False)),
            td_weight(batch, policy.executed_length) * ~batch.terminated,
        )
        loss = found.loss + self.config.value_penalty * penalty
        return replace(found, loss=loss, more={"value_penalty": penalty.detach()})


class SQAM(TRQAM):
    """See the module."""

    loss_class = SQAMLoss

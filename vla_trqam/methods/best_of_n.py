r"""Best of n: nothing of the policy is trained; a critic judges n chunks of the base.

The control for every method that spends more than one chunk: what a critic alone is worth at test
time. As IFQL, with a value of expectile kappa and Q regressed on it, but in the form of the QGF
paper (github zhouzypaul/qgf), which differs in who judges:

- V regresses onto the *least* target head, ``q = min_j Qbar_j(s, a)``, where IFQL takes their mean
  less rho deviations; its loss leaves out chunks that were cut short, as Q's does;
- the chunk that acts is the one whose least *target* value is the largest, where IFQL asks the
  online heads; the target, an average of the critics so far, does not flicker between updates.

The base's policy is never trained for it, so n = 1 acts as the base does, by the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vla_trqam.critic import CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.ifql import IFQL, IFQLConfig
from vla_trqam.methods.parts.off_policy import td_weight


@dataclass(frozen=True)
class BestOfNConfig(IFQLConfig):
    """Knobs of best of n.

    Attributes:
        num_samples: n, the base's chunks that acting chooses from.
        train_base: false, which it always is.
    """

    num_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_base:
            raise UserError("train_base is true, but best_of_n trains no policy: take ifql")


class BestOfNMethod(IFQL):
    """See the module."""

    requirements = replace(IFQL.requirements, idle=("--critic.pessimism",))
    config: BestOfNConfig

    @property
    def judge(self) -> CriticEnsemble:
        """The target heads."""
        return self.critic.target

    @torch.no_grad()
    def regressed(self, features: Tensor, action: Tensor) -> Tensor:
        """The least target head, (B,)."""
        return self.critic.target(features, action).amin(dim=0)

    def weight(self, batch: TransitionBatch[Any]) -> Tensor:
        """That of the TD loss, (B,)."""
        return td_weight(batch, self.policy.executed_length)

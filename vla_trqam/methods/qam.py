"""QAM: Q-learning with Adjoint Matching, TRQAM at ``lam = 1`` without a dual.

The inverse temperature beta multiplies the terminal adjoint; nothing holds the policy near its base
but the size of the critic's gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from vla_trqam.errors import UserError
from vla_trqam.methods.trqam_config import TRQAMConfig


@dataclass(frozen=True)
class QAMConfig(TRQAMConfig):
    """Knobs of QAM: those of TRQAM with its dual off, and beta.

    Attributes:
        inverse_temperature: beta.
        lam_init: 1, which QAM's lambda always is.
        dual_step_size: 0: there is no dual.
        kl_clip: null: the KL's average is for the log alone.
    """

    inverse_temperature: float = 1.0
    lam_init: float = 1.0
    dual_step_size: float = 0.0
    kl_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.inverse_temperature < math.inf:
            raise UserError(
                f"inverse_temperature is {self.inverse_temperature}; QAM's beta must be positive "
                "and finite"
            )
        for name, only in DUAL_OFF.items():
            if getattr(self, name) != only:
                raise UserError(
                    f"{name} is {getattr(self, name)}, but QAM has no dual: leave it out, or take "
                    "trqam"
                )

    @property
    def adjoint_scale(self) -> float:
        """Beta."""
        return self.inverse_temperature


DUAL_OFF: dict[str, float | str | None] = {
    **{"lam_init": 1.0, "dual_step_size": 0.0, "dual_steps": "additive", "kl_clip": None},
}
"""What switches TRQAM's dual off."""


def qam_config(config: TRQAMConfig, inverse_temperature: float) -> QAMConfig:
    """The same knobs with lambda frozen at 1, beta on the adjoint, and an unclipped KL average.

    Raises:
        UserError: beta is not positive.
    """
    kept = {field.name: getattr(config, field.name) for field in fields(TRQAMConfig)}
    bracket = {"lam_min": min(config.lam_min, 1.0), "lam_max": max(config.lam_max, 1.0)}
    return QAMConfig(**kept | DUAL_OFF | bracket, inverse_temperature=inverse_temperature)

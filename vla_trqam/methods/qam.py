"""QAM: Q-learning with Adjoint Matching, TRQAM at ``lam = 1`` without a dual.

The inverse temperature beta multiplies the terminal adjoint; nothing holds the policy near its base
but the size of the critic's gradient.
"""

from __future__ import annotations

from dataclasses import replace

from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import TRQAMConfig


def qam_config(config: TRQAMConfig, inverse_temperature: float) -> TRQAMConfig:
    """The same knobs with lambda frozen at 1, beta on the adjoint, and an unclipped KL average.

    Raises:
        UserError: beta is not positive.
    """
    if not inverse_temperature > 0.0:
        raise UserError(
            f"inverse_temperature is {inverse_temperature}; QAM's beta must be positive"
        )
    return replace(
        config,
        inverse_temperature=inverse_temperature,
        lam_init=1.0,
        lam_min=min(config.lam_min, 1.0),
        lam_max=max(config.lam_max, 1.0),
        dual_step_size=0.0,
        kl_clip=None,
    )

"""Behaviour cloning: flow matching on demonstrations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_trqam.errors import UserError


@dataclass(frozen=True)
class BehaviourCloningConfig:
    """Flow-matching pretraining.

    Attributes:
        lr: Adam's step size; it falls linearly to zero over the phase.
        ema_rate: the pretrained policy is the average of the weights with this rate.
    """

    lr: float = 1e-3
    ema_rate: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}; it must be positive and finite")
        if not 0.0 < self.ema_rate <= 1.0:
            raise UserError(f"ema_rate is {self.ema_rate}; it must be in (0, 1]")

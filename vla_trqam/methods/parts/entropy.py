"""A temperature that keeps the entropy of a squashed Gaussian near a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError

TEMPERATURE = "temperature"


class Temperature(nn.Module):
    """alpha, kept as its logarithm; 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """Alpha."""
        return self.log_value.exp()


def entropy_terms(
    alpha: Tensor, log_p: Tensor, q: Tensor, target: float
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""``mean (alpha log p - Q)`` with alpha fixed, and ``alpha (entropy - target)`` that moves it.

    Soft actor-critic (Haarnoja et al., 2018) with the entropy ``-mean log p`` fixed in the second
    term.

    Args:
        alpha: the temperature, a scalar.
        log_p: of what was drawn, (B,).
        q: its value, (B,).
        target: of the entropy.

    Returns:
        The sum of both, a scalar, and what is logged of them.
    """
    entropy = -log_p.detach().mean()
    actor = (alpha.detach() * log_p - q).mean()
    logged = {
        "actor_loss": actor.detach(),
        "actor_q": q.detach().mean(),
        "entropy": entropy,
        "temperature": alpha.detach(),
    }
    return actor + alpha * (entropy - target), logged


def check_entropy_target(wanted: float | None) -> None:
    """Refuses one that no temperature could reach.

    Raises:
        UserError: it is NaN or infinite.
    """
    if wanted is not None and not math.isfinite(wanted):
        raise UserError(f"target_entropy is {wanted}; it must be finite")


def entropy_target(wanted: float | None, size: int) -> float:
    """The target that was asked for; minus half of so many numbers where none was."""
    return -0.5 * size if wanted is None else wanted

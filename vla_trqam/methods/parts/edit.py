r"""An edit behind a flow: ``a = clip(a_flow + scale e)`` with ``e ~ pi_e(. | s, a_flow)``.

``e = tanh(u)`` is a squashed Gaussian in the box (-1, 1); it sees the flow's action clipped. It is
trained by ``-mean_j Q_j(s, a) + alpha log p(e)``, alpha by the entropy's distance from its target.
QAM-E has it behind QAM's flow, residual RL behind the frozen one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vla_trqam.critic import CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, Noise
from vla_trqam.methods.parts.entropy import (
    TEMPERATURE,
    Temperature,
    check_entropy_target,
    entropy_target,
    entropy_terms,
)
from vla_trqam.methods.parts.off_policy import Losses
from vla_trqam.networks import TanhGaussian
from vla_trqam.policy import Context, FlowPolicy

EDIT = "edit"


class EditKnobs(Protocol):
    """What an edit's knobs are called."""

    @property
    def edit_scale(self) -> float:
        """Half the width of the box that an edit is chosen from."""

    @property
    def target_entropy(self) -> float | None:
        """Of the edit in units of the box (-1, 1)."""

    @property
    def edit_hidden_dims(self) -> tuple[int, ...]:
        """Widths of the edit network's hidden layers."""


def check_edit(knobs: EditKnobs) -> None:
    """Refuses an edit's knobs that mean nothing.

    Raises:
        UserError: the scale is negative or not finite, so is the entropy's target, or a width is
            not positive.
    """
    check_entropy_target(knobs.target_entropy)
    if not 0.0 <= knobs.edit_scale < float("inf"):
        raise UserError(f"edit_scale is {knobs.edit_scale}; it must be finite and not negative")
    if min(knobs.edit_hidden_dims, default=1) < 1:
        raise UserError(
            f"edit_hidden_dims is {list(knobs.edit_hidden_dims)}; its widths must be at least 1"
        )


def edit_networks(policy: FlowPolicy, knobs: EditKnobs) -> dict[str, nn.Module]:
    """The edit, by the width of the features and of what is executed, and its temperature."""
    size = policy.executed_size
    network = TanhGaussian(policy.feature_dim + size, size, knobs.edit_hidden_dims)
    return {EDIT: network, TEMPERATURE: Temperature()}


@dataclass(frozen=True)
class Edit:
    """What edits a flow's chunks.

    Attributes:
        policy: whose features and limits.
        networks: of :func:`edit_networks`, by name.
        knobs: the scale and the entropy's target.
    """

    policy: FlowPolicy
    networks: Any
    knobs: EditKnobs

    def __call__(self, features: Tensor, chunk: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Edited chunks with the log-density of their edits.

        Args:
            features: (B, F).
            chunk: of the flow, (B, H, A); no gradient flows to it.
            noise: standard normal, (B, H, A).

        Returns:
            What is executed, (B, n, a), and ``log p(e)`` in the box (-1, 1), (B,).
        """
        flow = self.policy.executed(chunk).detach()
        inputs = torch.cat([features.to(torch.float32), flow.flatten(1)], dim=1)
        drawn = self.policy.executed(noise, clip=False).flatten(1)
        edit, log_p = self.networks[EDIT](inputs, drawn)
        edited = flow + self.knobs.edit_scale * edit.view_as(flow)
        return self.policy.within_limits(edited), log_p

    def terms(
        self, critic: CriticEnsemble, features: Tensor, chunk: Tensor, noise: Tensor
    ) -> Losses:
        """The edit's and the temperature's losses at the flow's chunks; others as in a call."""
        action, log_p = self(features, chunk, noise)
        q = critic(features, action, frozen=True).mean(dim=0)
        target = entropy_target(self.knobs.target_entropy, self.policy.executed_size)
        loss, logged = entropy_terms(self.networks[TEMPERATURE](), log_p, q, target)
        return Losses(loss, logged)


@dataclass(frozen=True)
class EditActor:
    """Another actor's chunk, edited.

    Attributes:
        flow: makes the chunk.
        edit: what edits it.
    """

    flow: Actor
    edit: Edit

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`; what is not executed is the flow's."""
        policy = self.edit.policy
        chunk = self.flow.chunk(context, noise)
        drawn = noise.normal(policy.chunk_shape)
        return policy.embedded(self.edit(policy.features(context), chunk, drawn)[0], chunk)

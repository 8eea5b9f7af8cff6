r"""Residual RL: an edit behind the frozen flow, at chunk level and with entropy terms.

``L = L_Q + mean (alpha log p(e) - mean_j Q_j(s, a)) + alpha (entropy - target)`` with
``a = clip(a_base + scale e)``, ``e ~ pi_e(. | s, a_base)`` (:mod:`vla_trqam.methods.parts.edit`):
FEdit of github ColinQiyangLi/qam, after EXPO. The policy is a black box: neither its weights nor
its gradients are asked for. What acts, in the TD target too, is the base's flow and a sampled edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, FlowActor, Requirements, Which
from vla_trqam.methods.parts.edit import Edit, EditActor, check_edit, edit_networks
from vla_trqam.methods.parts.off_policy import (
    Draws,
    FieldActor,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
)
from vla_trqam.policy import Context
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

DRAWS = ("next", "next_edit", "flow", "edit")


@dataclass(frozen=True)
class ResidualConfig(OffPolicyConfig):
    """Knobs of residual RL.

    Attributes:
        edit_scale: half the width of the box that an edit is chosen from, in the flow's units.
        target_entropy: of the edit in units of the box (-1, 1); null for minus half its numbers.
        edit_hidden_dims: widths of the edit network's hidden layers.
    """

    edit_scale: float = 0.2
    target_entropy: float | None = None
    edit_hidden_dims: tuple[int, ...] = (256, 256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_edit(self)
        if self.edit_scale == 0.0:
            raise UserError("edit_scale is 0.0, which leaves the base alone; it must be positive")


class Residual(SummedLosses):
    """See the module."""

    requirements = Requirements(trains_field=False, next_actions=True, host_acts=False)
    config: ResidualConfig

    def make_networks(self) -> dict[str, nn.Module]:
        """The edit and its temperature."""
        return edit_networks(self.policy, self.config)

    def values(self) -> tuple[str, ...]:
        """None beside the critic."""
        return ()

    @property
    def edit(self) -> Edit:
        """Behind the base."""
        return Edit(self.policy, self.own, self.config)

    def actor(self, which: Which = "tuned") -> Actor:
        """The flow and a sampled edit; of a training base, the edit's flow is its online field."""
        if which == "base":
            return FlowActor(self.policy, "base")
        return EditActor(FieldActor(self.policy, self.cloned_field), self.edit)

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """Of the flow and the edit at both observations, and the cloning's."""
        normal = batch.action.new_empty((len(DRAWS), *batch.action.shape))
        normal.normal_(generator=generator)
        return dict(zip(DRAWS, normal, strict=True)) | draw_cloning(batch.action, generator)

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """See the module."""
        context = self.policy.encode(batch.observation)
        features = self.policy.features(context)
        critic = self.critic_losses(batch, draws)
        chunk = self._flow(context, draws["flow"])
        edit = self.edit.terms(self.critic.online, features, chunk, draws["edit"])
        loss, logged = critic.loss + edit.loss, {**critic.logged, **edit.logged}
        bc = self.behaviour_cloning(batch, draws, context)
        if bc is not None:
            loss, logged["bc_loss"] = loss + bc, bc.detach()
        return Losses(loss, logged, critic.next_action)

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The TD loss."""
        policy = self.policy
        context = policy.encode(batch.next_observation)
        next_features = policy.features(context)
        next_action = batch.next_action
        if next_action is None:
            with torch.no_grad():
                chunk = self._flow(context, draws["next"])
                next_action, _ = self.edit(next_features, chunk, draws["next_edit"])
        features = policy.features(policy.encode(batch.observation))
        value = self.critic.next_value(next_features, next_action)
        td, logged = self.temporal_difference(batch, features, value)
        return Losses(td, logged, next_action)

    @torch.no_grad()
    def _flow(self, context: Context, x_0: Tensor) -> Tensor:
        """The flow's chunk; of a training base, by its online field."""
        field, grid = self.cloned_field, TimeGrid(self.policy.num_flow_steps)
        return sample_ode(lambda x, tau: field(x, tau, context), x_0, grid)

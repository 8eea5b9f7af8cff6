r"""QAM-E: QAM with an entropy-tuned edit behind its flow (github ColinQiyangLi/qam).

The flow is trained as QAM trains it; beside it an edit (:mod:`vla_trqam.methods.parts.edit`) is
trained at the tuned flow's own chunks, from fresh noise and without gradient to the flow. What
acts, in the TD target too, is the flow and a sampled edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, Requirements, Which
from vla_trqam.methods.parts.adjoint_matching import TRQAMLoss, UpdateNoise
from vla_trqam.methods.parts.edit import Edit, EditActor, check_edit, edit_networks
from vla_trqam.methods.parts.off_policy import Draws, Losses
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.policy import Context
from vla_trqam.sde import sample_ode

DRAWS = ("next_edit", "edit_flow", "edit")


@dataclass(frozen=True)
class QAMEConfig(QAMConfig):
    """Knobs of QAM-E: those of QAM, and the edit's.

    Attributes:
        edit_scale: half the width of the box that an edit is chosen from, in the flow's units; with
            0 it acts as QAM does, and is trained as QAM but for the clip of the actor's gradients,
            which the edit and its temperature share.
        target_entropy: of the edit in units of the box (-1, 1); null for minus half its numbers.
        edit_hidden_dims: widths of the edit network's hidden layers.
    """

    edit_scale: float = 0.1
    target_entropy: float | None = None
    edit_hidden_dims: tuple[int, ...] = (256, 256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_edit(self)
        if self.average_rate:
            raise UserError(
                f"average_rate is {self.average_rate}, but QAM-E's edit was trained behind the "
                "weights themselves and not behind their mean: set it to 0, or take qam"
            )


class QAMELoss(TRQAMLoss):
    """QAM's, and the edit's terms."""

    config: QAMEConfig

    def make_networks(self) -> dict[str, nn.Module]:
        """The edit and its temperature."""
        return edit_networks(self.policy, self.config)

    @property
    def edit(self) -> Edit:
        """Behind the tuned flow."""
        return Edit(self.policy, self.own, self.config)

    def draw_more(self, action: Tensor, generator: torch.Generator) -> Draws:
        """Of the next edit, and of the flow's chunk and its edit at the observations."""
        normal = action.new_empty((len(DRAWS), *action.shape)).normal_(generator=generator)
        return dict(zip(DRAWS, normal, strict=True))

    @torch.no_grad()
    def next_action(self, next_context: Context, chunk: Tensor, noise: UpdateNoise) -> Tensor:
        """The edited one."""
        features = self.policy.features(next_context)
        return self.edit(features, chunk, noise.more["next_edit"])[0]

    def more_terms(self, noise: UpdateNoise, context: Context, features: Tensor) -> Losses:
        """The edit's, at the tuned flow's chunks."""
        with torch.no_grad():
            chunk = sample_ode(
                lambda x, tau: self.policy.velocity(x, tau, context),
                noise.more["edit_flow"],
                self.grid,
            )
        return self.edit.terms(self.critic.online, features, chunk, noise.more["edit"])


class QAME(TRQAM):
    """See the module."""

    requirements = Requirements(
        trains_field=True, next_actions=True, host_acts=False, paths=True, adjoint=True
    )
    loss_class = QAMELoss
    config: QAMEConfig
    loss: QAMELoss

    def actor(self, which: Which = "tuned") -> Actor:
        """The flow and a sampled edit; the base is its own flow."""
        flow = super().actor(which)
        return flow if which == "base" else EditActor(flow, self.loss.edit)

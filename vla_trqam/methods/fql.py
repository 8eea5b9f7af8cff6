r"""FQL: flow Q-learning; a one-step network acts, distilled from the flow (Park et al., 2025).

``L = L_Q + alpha mean (mu(s, z) - clip ODE_v(s, z))^2 - mean_j Q_j(s, clip mu(s, z))``, a mean over
batch and numbers (and ``+ L_BC(v)`` where the base keeps training); the first term trains the
critic, the others mu alone. What acts, in the TD target too, is ``clip mu(s, z)`` with
``z ~ N(0, I)``. There is no exploration beyond z. A critic that is learnt before (a warm-up) values
the flow's own chunks: the one-step network knows nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, FlowActor, Noise, Requirements, Which
from vla_trqam.methods.parts.finite import measured
from vla_trqam.methods.parts.off_policy import (
    Draws,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
    rows_of,
    slices,
)
from vla_trqam.networks import MLP
from vla_trqam.policy import Context, FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

ONE_STEP = "one_step"


@dataclass(frozen=True)
class FQLConfig(OffPolicyConfig):
    """Knobs of FQL.

    Attributes:
        alpha: weight of the distillation, a mean over the chunk's numbers: the larger, the closer
            the one-step network stays to the flow.
        hidden_dims: widths of the one-step network's hidden layers.
        layer_norm: normalise after every activation of it.
        normalize_q_loss: divide the critic's term by the batch's mean |Q|, where Q is the critics'
            mean, so that alpha means the same on every scale of rewards.
    """

    alpha: float = 10.0
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = False
    normalize_q_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < float("inf"):
            raise UserError(f"alpha is {self.alpha}; it must be finite and not negative")


class OneStep(nn.Module):
    """``mu(s, z)``: from noise to the executed numbers of a chunk at once.

    Args:
        policy: whose features and chunks.
        config: the network's shape.
    """

    def __init__(self, policy: FlowPolicy, config: FQLConfig) -> None:
        super().__init__()
        size = policy.executed_size
        width = policy.feature_dim + size
        self.network = MLP(width, size, config.hidden_dims, layer_norm=config.layer_norm)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Features (B, F), noise (B, n, a) -> actions before they are clipped, (B, n, a)."""
        inputs = torch.cat([features, noise.flatten(1)], dim=1)
        return self.network(inputs.to(torch.float32)).view_as(noise)


@dataclass(frozen=True)
class OneStepActor:
    """``clip mu(s, z)``.

    Attributes:
        policy: whose features and limits.
        network: mu.
    """

    policy: FlowPolicy
    network: OneStep

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`; what is not executed is zero."""
        z = self.policy.executed(noise.normal(self.policy.chunk_shape), clip=False)
        action = self.network(self.policy.features(context), z)
        return self.policy.embedded(self.policy.within_limits(action))


class FQL(SummedLosses):
    """See the module."""

    requirements = Requirements(trains_field=False, next_actions=True, host_acts=False)
    config: FQLConfig
    _joint_size: float | None = None
    """``|Q|`` of the update that is being made, where it has several parts."""

    def make_networks(self) -> dict[str, nn.Module]:
        """The one-step network."""
        return {ONE_STEP: OneStep(self.policy, self.config)}

    def values(self) -> tuple[str, ...]:
        """None beside the critic."""
        return ()

    @property
    def one_step(self) -> OneStep:
        """Mu."""
        network = self.own[ONE_STEP]
        assert isinstance(network, OneStep)
        return network

    def actor(self, which: Which = "tuned") -> Actor:
        """The one-step network; the base is the flow."""
        if which == "base":
            return FlowActor(self.policy, "base")
        return OneStepActor(self.policy, self.one_step)

    def first_actor(self) -> Actor:
        """The flow."""
        return FlowActor(self.policy, "base")

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """Noise of the next action and of the distillation, and the cloning's."""
        normal = batch.action.new_empty((2, *batch.action.shape)).normal_(generator=generator)
        return {"next": normal[0], "distill": normal[1], **draw_cloning(batch.action, generator)}

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """See the module."""
        policy = self.policy
        context = policy.encode(batch.observation)
        next_context = policy.encode(batch.next_observation)
        features = policy.features(context)
        next_action = batch.next_action
        if next_action is None:
            next_action = self._next_action(next_context, draws)
        td, logged = self._td(batch, features, next_context, next_action)
        distilled = self._flow_action(context, draws["distill"])
        action, q = self._value_of(features, draws["distill"])
        distill = (action - distilled).square().mean()
        value = q.mean()
        scale = self._size_of(q)
        loss = td + self.config.alpha * distill - value / scale
        bc = self.behaviour_cloning(batch, draws, context)
        terms = {"distill_loss": distill.detach(), "actor_q": value.detach()}
        if bc is not None:
            loss, terms["bc_loss"] = loss + bc, bc.detach()
        return Losses(loss, logged | terms, next_action)

    def update_from(self, batch: TransitionBatch[Any], draws: Draws, *, num_parts: int = 1) -> None:
        """See :meth:`SummedLosses.update_from`; of several parts ``|Q|`` is the joint batch's."""
        several = num_parts > 1 or self.ranks.count > 1
        joint = several and self.config.normalize_q_loss
        self._joint_size = self._measured_size(batch, draws, num_parts) if joint else None
        super().update_from(batch, draws, num_parts=num_parts)

    @torch.no_grad()
    def _measured_size(self, batch: TransitionBatch[Any], draws: Draws, num_parts: int) -> float:
        sizes, parts = [], slices(len(batch), num_parts)
        for rows in parts:
            with self.ranks.autocast():
                part = rows_of(batch, rows)
                features = self.policy.features(self.policy.encode(part.observation))
                q = self._value_of(features, draws["distill"][rows])[1]
            sizes.append(q.mean(dim=0).abs().mean())
        shares = self.ranks.shares([rows.stop - rows.start for rows in parts])
        return measured(self.ranks, {"|Q|": (sizes, shares)})["|Q|"]

    def _size_of(self, q: Tensor) -> Tensor | float:
        if not self.config.normalize_q_loss:
            return 1.0
        if self._joint_size is not None:
            return self._joint_size
        return q.detach().mean(dim=0).abs().mean()

    def _value_of(self, features: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """The one-step network's chunks at this noise, as executed but for the limits, and Q."""
        action = self.one_step(features, self.policy.executed(x_0, clip=False))
        q = self.critic.online(features, self.policy.within_limits(action), frozen=True)
        return action, q

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The TD loss, at the flow's chunks."""
        context = self.policy.encode(batch.next_observation)
        next_action = batch.next_action
        if next_action is None:
            next_action = self._flow_action(context, draws["next"])
        features = self.policy.features(self.policy.encode(batch.observation))
        td, logged = self._td(batch, features, context, next_action)
        return Losses(td, logged)

    def _td(
        self,
        batch: TransitionBatch[Any],
        features: Tensor,
        next_context: Context,
        next_action: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value = self.critic.next_value(self.policy.features(next_context), next_action)
        return self.temporal_difference(batch, features, value)

    @torch.no_grad()
    def _next_action(self, context: Context, draws: Draws) -> Tensor:
        noise = self.policy.executed(draws["next"], clip=False)
        return self.policy.within_limits(self.one_step(self.policy.features(context), noise))

    @torch.no_grad()
    def _flow_action(self, context: Context, x_0: Tensor) -> Tensor:
        """What is executed of the flow's chunk; of a training base, by its online field."""
        field = self.cloned_field
        grid = TimeGrid(self.policy.num_flow_steps)
        return self.policy.executed(sample_ode(lambda x, tau: field(x, tau, context), x_0, grid))

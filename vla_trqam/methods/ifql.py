r"""IFQL: implicit Q-learning beside a frozen flow, which acts by the best of n chunks.

``L_V = mean w (q - V(s))^2`` with ``q = mean_j Qbar_j(s, a) - rho std_j Qbar_j(s, a)`` at chunks
of the data and ``w = kappa`` where ``q >= V``, else ``1 - kappa`` (Kostrikov et al., 2022); the
critic's target is ``R + gamma^n V(s')`` with the online V. Acting: n chunks of the flow, the one
whose least online Q is the largest (Park et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_trqam.critic import CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Actor, FlowActor, Noise, Requirements, Which
from vla_trqam.methods.parts.off_policy import (
    Draws,
    FieldActor,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
)
from vla_trqam.networks import MLP
from vla_trqam.policy import Context, FlowPolicy

VALUE = "value"


@dataclass(frozen=True)
class IFQLConfig(OffPolicyConfig):
    """Knobs of IFQL.

    Attributes:
        kappa: the expectile, in (0, 1): above 0.5 the value leans to the better chunks.
        num_samples: chunks of the flow that acting chooses from.
    """

    kappa: float = 0.9
    num_samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.kappa < 1.0:
            raise UserError(f"kappa is {self.kappa}; the expectile must lie between 0 and 1")
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}; it must be at least 1")


@dataclass(frozen=True)
class BestOfN:
    """The best of several chunks of another actor.

    Attributes:
        policy: whose features.
        proposals: what makes the chunks.
        critic: whose members judge: the least of them counts.
        num_samples: n.
    """

    policy: FlowPolicy
    proposals: Actor
    critic: CriticEnsemble
    num_samples: int

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`."""
        features = self.policy.features(context)
        best: Tensor | None = None
        for _ in range(self.num_samples):
            chunk = self.proposals.chunk(context, noise)
            value = self.critic(features, self.policy.executed(chunk)).amin(dim=0)
            if best is None:
                best, highest = chunk, value
            else:
                better = value > highest
                best = torch.where(better.view(-1, 1, 1), chunk, best)
                highest = torch.where(better, value, highest)
        assert best is not None
        return best


class IFQL(SummedLosses):
    """See the module."""

    requirements = Requirements(trains_field=False, next_actions=False, host_acts=False)
    config: IFQLConfig

    def make_networks(self) -> dict[str, nn.Module]:
        """V, in the critic's shape."""
        like = self.critic.online
        value = MLP(self.policy.feature_dim, 1, like.hidden_dims, layer_norm=like.layer_norm)
        return {VALUE: value}

    def values(self) -> tuple[str, ...]:
        """V."""
        return (VALUE,)

    def actor(self, which: Which = "tuned") -> Actor:
        """The best of n; the base is a single chunk of the flow."""
        if which == "base":
            return FlowActor(self.policy, "base")
        flow = FieldActor(self.policy, self.cloned_field)
        return BestOfN(self.policy, flow, self.judge, self.config.num_samples)

    @property
    def judge(self) -> CriticEnsemble:
        """Whose least head says which chunk acts."""
        return self.critic.online

    @torch.no_grad()
    def regressed(self, features: Tensor, action: Tensor) -> Tensor:
        """What V regresses onto at chunks of the data, (B,)."""
        return self.critic.next_value(features, action)

    def weight(self, batch: TransitionBatch[Any]) -> Tensor:
        """How much of a chunk V's loss counts, (B,): IFQL counts all."""
        return torch.ones_like(batch.chunk_return)

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """The cloning's alone."""
        return draw_cloning(batch.action, generator) if self.config.train_base else {}

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """See the module."""
        found = self.critic_losses(batch, draws)
        bc = self.behaviour_cloning(batch, draws, self.policy.encode(batch.observation))
        if bc is None:
            return found
        return Losses(found.loss + bc, {**found.logged, "bc_loss": bc.detach()})

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The critic's and the value's: all that IFQL learns while its base is frozen."""
        policy, value = self.policy, self.own[VALUE]
        features = policy.features(policy.encode(batch.observation))
        with torch.no_grad():
            next_features = policy.features(policy.encode(batch.next_observation))
            next_value = value(next_features).squeeze(1)
            q = self.regressed(features, policy.executed(batch.action, clip=False))
        td, logged = self.temporal_difference(batch, features, next_value)
        v = value(features).squeeze(1)
        side = torch.where(q >= v.detach(), self.config.kappa, 1.0 - self.config.kappa)
        loss = (self.weight(batch) * side * (q - v).square()).mean()
        terms = {"value_loss": loss.detach(), "value_mean": v.detach().mean()}
        return Losses(td + loss, logged | terms)

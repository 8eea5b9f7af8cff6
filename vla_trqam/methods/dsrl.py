r"""DSRL: a noise network in front of the frozen flow (Wagenmaker et al., 2025).

This is the form with a distilled noise critic. The noise actor draws ``z = scale tanh(u)``,
``u ~ N(mean(s), std(s)^2)``; the flow makes an action of it.
(1) TD with ``a' = ODE_base(s', z(s'))``;
(2) the noise critic learns what the flow makes of noise:
``mean_j (Q^z_j(s, w) - Q_j(s, ODE_base(s, w)))^2``, ``w ~ N(0, I)``;
(3) the actor: ``alpha log p - mean_j Q^z_j(s, z)``, with alpha moved so that the entropy is near
its target.
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
from vla_trqam.methods.parts.entropy import (
    TEMPERATURE,
    Temperature,
    check_entropy_target,
    entropy_target,
    entropy_terms,
)
from vla_trqam.methods.parts.off_policy import (
    Draws,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
)
from vla_trqam.networks import TanhGaussian
from vla_trqam.policy import Context
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

ACTOR, NOISE_CRITIC = "noise_actor", "noise_critic"


@dataclass(frozen=True)
class DSRLConfig(OffPolicyConfig):
    """Knobs of DSRL.

    Attributes:
        noise_scale: half the width of the box that the noise is chosen from.
        target_entropy: of the noise in units of the box (-1, 1); null for minus half its numbers.
        hidden_dims: widths of the noise actor's hidden layers.
    """

    noise_scale: float = 1.0
    target_entropy: float | None = None
    hidden_dims: tuple[int, ...] = (256, 256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_entropy_target(self.target_entropy)
        if not 0.0 < self.noise_scale < float("inf"):
            raise UserError(f"noise_scale is {self.noise_scale}; it must be positive and finite")


@dataclass(frozen=True)
class NoiseActor:
    """The flow from chosen noise.

    Attributes:
        method: whose noise and base.
    """

    method: DSRL

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`."""
        features = self.method.policy.features(context)
        drawn = noise.normal(self.method.policy.chunk_shape)
        return self.method.flow(context, self.method.choose(features, drawn)[0])


class DSRL(SummedLosses):
    """See the module."""

    requirements = Requirements(trains_field=False, next_actions=True, host_acts=False)
    config: DSRLConfig

    def make_networks(self) -> dict[str, nn.Module]:
        """The noise actor, its critic in the critic's shape, and the temperature."""
        like, size = self.critic.online, self.policy.executed_size
        return {
            ACTOR: TanhGaussian(self.policy.feature_dim, size, self.config.hidden_dims),
            NOISE_CRITIC: CriticEnsemble(
                self.policy.feature_dim,
                size,
                like.hidden_dims,
                like.ensemble_size,
                layer_norm=like.layer_norm,
            ),
            TEMPERATURE: Temperature(),
        }

    def values(self) -> tuple[str, ...]:
        """The noise critic."""
        return (NOISE_CRITIC,)

    def actor(self, which: Which = "tuned") -> Actor:
        """The flow from chosen noise; the base's is plain."""
        return FlowActor(self.policy, "base") if which == "base" else NoiseActor(self)

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """For the noise actor at both observations, the distillation's noise, and the cloning's."""
        normal = batch.action.new_empty((3, *batch.action.shape)).normal_(generator=generator)
        names = ("next", "distill", "actor")
        return dict(zip(names, normal, strict=True)) | draw_cloning(batch.action, generator)

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """See the module."""
        policy = self.policy
        context = policy.encode(batch.observation)
        features = policy.features(context)
        critic = self.critic_losses(batch, draws)
        distill = self._distillation(context, features, draws["distill"])
        z, log_p = self.choose(features, draws["actor"])
        q = self._noise_critic(features, policy.executed(z, clip=False), frozen=True).mean(dim=0)
        target = entropy_target(self.config.target_entropy, policy.executed_size)
        actor, terms = entropy_terms(self.own[TEMPERATURE](), log_p, q, target)
        loss, terms["noise_critic_loss"] = critic.loss + distill + actor, distill.detach()
        bc = self.behaviour_cloning(batch, draws, context)
        if bc is not None:
            loss, terms["bc_loss"] = loss + bc, bc.detach()
        return Losses(loss, {**critic.logged, **terms}, critic.next_action)

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The TD loss."""
        policy = self.policy
        context = policy.encode(batch.next_observation)
        next_features = policy.features(context)
        next_action = batch.next_action
        if next_action is None:
            with torch.no_grad():
                z, _ = self.choose(next_features, draws["next"])
                next_action = policy.executed(self.flow(context, z))
        features = policy.features(policy.encode(batch.observation))
        value = self.critic.next_value(next_features, next_action)
        td, logged = self.temporal_difference(batch, features, value)
        return Losses(td, logged, next_action)

    def choose(self, features: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The noise actor's noise and its log-density in the box (-1, 1).

        Args:
            features: (B, F).
            drawn: standard normal, (B, H, A).

        Returns:
            The flow's noise, (B, H, A), as drawn where it is not executed, and (B,).
        """
        real = self.policy.executed(drawn, clip=False)
        z, log_p = self.own[ACTOR](features.to(torch.float32), real.flatten(1))
        chosen = self.config.noise_scale * z.view_as(real)
        return self.policy.embedded(chosen, drawn), log_p

    @torch.no_grad()
    def flow(self, context: Context, noise: Tensor) -> Tensor:
        """The base's chunk from this noise: (B, H, A) -> (B, H, A)."""
        policy = self.policy
        return sample_ode(
            lambda x, tau: policy.base_velocity(x, tau, context),
            noise,
            TimeGrid(policy.num_flow_steps),
        )

    def _distillation(self, context: Context, features: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            known = self.critic.online(features, self.policy.executed(self.flow(context, noise)))
        found = self._noise_critic(features, self.policy.executed(noise, clip=False))
        return (found - known).square().mean()

    def _noise_critic(self, features: Tensor, noise: Tensor, *, frozen: bool = False) -> Tensor:
        values: Tensor = self.own[NOISE_CRITIC](features, noise, frozen=frozen)
        return values

r"""CGQL: Q's action gradient guides the flow of the base, whose weights it leaves alone.

The base's Euler step, and from the second one on a push towards the density ``exp(beta Q)``:

    ``v = v_base(x, tau) + theta [(1 - tau) beta grad_x mean_j Q_j(s, x, tau) + x] / tau``

The bracket over tau is the velocity of a flow whose score is ``beta grad Q``. What acts, in the TD
target too, is the clipped end of these steps. ``Q(s, x, tau)`` values a noisy chunk,
``x = (1 - tau) eps + tau a``; TD teaches it at ``tau = 1``. There are two ways to the rest:

- ``cgql`` asks for the gradient at ``tau = 1``, as if the noisy chunk were a clean one;
- ``cgql_l`` learns it: with ``d = beta (Qbar_j(s, a, 1) - Q_j(s, x, tau))`` the loss is LINEX,
  ``exp(d) + beta Q_j`` where ``d <= 5``, else ``d``. Its minimum is
  ``Q = log E[exp(beta Qbar(s, a, 1)) | x] / beta``, whose gradient is the guidance that is exact.

An ablation of the QAM paper's authors; the form is that of github yonghdong/trqam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_target
from vla_trqam.methods.base import Actor, FlowActor, Noise, Requirements, Which
from vla_trqam.methods.parts.off_policy import (
    Draws,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
    td_weight,
)
from vla_trqam.policy import Context, FlowPolicy
from vla_trqam.precision import own_precision
from vla_trqam.time_grid import TimeGrid, full_tau

if TYPE_CHECKING:
    from accelerate import Accelerator

NoisyLoss = Literal["linex", "mse"]


@dataclass(frozen=True)
class CGQLConfig(OffPolicyConfig):
    """Knobs of CGQL.

    Attributes:
        inverse_temperature: beta, what Q is multiplied by.
        guidance: theta, how much of the push is added to the base's velocity.
    """

    inverse_temperature: float = 1.0
    guidance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.inverse_temperature < math.inf:
            raise UserError(
                f"inverse_temperature is {self.inverse_temperature}; it must be positive and finite"
            )
        if not 0.0 <= self.guidance < math.inf:
            raise UserError(f"guidance is {self.guidance}; it must be finite and not negative")

    def check_flow_steps(self, count: int) -> None:
        """See :meth:`MethodConfig.check_flow_steps`."""
        if count < 2:
            raise UserError(
                "is too few for cgql, whose guidance begins with the second: take at least 2 by "
                "--policy.tuned_flow_steps"
            )


@dataclass(frozen=True)
class CGQLLConfig(CGQLConfig):
    """Knobs of CGQL-L.

    Attributes:
        noisy_weight: of the loss at noisy chunks, beside the TD loss.
        noisy_loss: "linex", or "mse", which learns ``E[Qbar | x]`` instead.
        linex_clip: the d beyond which LINEX grows no more than d.
    """

    noisy_weight: float = 0.001
    noisy_loss: NoisyLoss = "linex"
    linex_clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noisy_weight", "linex_clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.noisy_loss not in get_args(NoisyLoss):
            known = " or ".join(get_args(NoisyLoss))
            raise UserError(f"noisy_loss is {self.noisy_loss}; it must be {known}")


class NoisyCriticEnsemble(CriticEnsemble):
    """``Q_e(s, x, tau)``: tau is one more number of the input, and 1 where none is given.

    So whoever knows no noisy chunks asks it for clean ones.

    Args:
        feature_dim: width of the observation features.
        action_dim: numbers in a chunk, H * A.
        hidden_dims: widths of the hidden layers.
        ensemble_size: E.
        layer_norm: normalise after every activation.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int],
        ensemble_size: int,
        *,
        layer_norm: bool,
    ) -> None:
        super().__init__(
            feature_dim, action_dim + 1, hidden_dims, ensemble_size, layer_norm=layer_norm
        )

    def forward(
        self,
        features: Tensor,
        action: Tensor,
        *,
        tau: Tensor | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """As :meth:`CriticEnsemble.forward`, with tau (B,)."""
        flat = action.flatten(1)
        column = flat.new_ones(len(flat)) if tau is None else tau.to(flat)
        return super().forward(features, torch.cat([flat, column.unsqueeze(1)], 1), frozen=frozen)


def with_time(critic: Critic, policy: FlowPolicy) -> Critic:
    """A fresh critic of noisy chunks, in the shape of one of clean chunks."""
    like = critic.online
    ensemble = NoisyCriticEnsemble(
        policy.feature_dim,
        policy.executed_size,
        like.hidden_dims,
        like.ensemble_size,
        layer_norm=like.layer_norm,
    )
    noisy = Critic(
        ensemble,
        pessimism=critic.pessimism,
        adjoint_pessimism=critic.adjoint_pessimism,
        target_rate=critic.target_rate,
        clip_actions=critic.clip_actions,
    )
    return noisy.to(next(critic.parameters()).device)


@dataclass(frozen=True)
class GuidedActor:
    """The base's flow, guided.

    Attributes:
        method: whose base and critic.
    """

    method: CGQL

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`."""
        return self.method.guided(context, noise.normal(self.method.policy.chunk_shape))


class CGQL(SummedLosses):
    """See the module; the config says which of the two."""

    requirements = Requirements(trains_field=False, next_actions=True, host_acts=False)
    config: CGQLConfig

    def __init__(
        self,
        policy: FlowPolicy,
        critic: Critic,
        config: CGQLConfig,
        accelerator: Accelerator | None = None,
    ) -> None:
        """The critic given says the shape; the method's own sees the time too."""
        super().__init__(policy, with_time(critic, policy), config, accelerator)

    def make_networks(self) -> dict[str, nn.Module]:
        """None beside the critic."""
        return {}

    def values(self) -> tuple[str, ...]:
        """None beside the critic."""
        return ()

    def actor(self, which: Which = "tuned") -> Actor:
        """The guided flow; the base's is plain."""
        return FlowActor(self.policy, "base") if which == "base" else GuidedActor(self)

    @property
    def noisy(self) -> CGQLLConfig | None:
        """The knobs of the critic's loss at noisy chunks; None where it has none."""
        return self.config if isinstance(self.config, CGQLLConfig) else None

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """Noise of the next action, noise and times of the noisy chunks, and the cloning's."""
        draws = {"next": torch.empty_like(batch.action).normal_(generator=generator)}
        if self.noisy is not None:
            noisy = draw_cloning(batch.action, generator)
            draws |= {"noisy_x_0": noisy["bc_x_0"], "noisy_tau": noisy["bc_tau"]}
        return draws | draw_cloning(batch.action, generator)

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The critic's, and a training base's."""
        found = self.critic_losses(batch, draws)
        bc = self.behaviour_cloning(batch, draws, self.policy.encode(batch.observation))
        if bc is None:
            return found
        logged = {**found.logged, "bc_loss": bc.detach()}
        return Losses(found.loss + bc, logged, found.next_action)

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The TD loss, and that at noisy chunks."""
        policy = self.policy
        context = policy.encode(batch.next_observation)
        next_action = batch.next_action
        if next_action is None:
            next_action = policy.executed(self.guided(context, draws["next"]))
        value = self.critic.next_value(policy.features(context), next_action)
        features = policy.features(policy.encode(batch.observation))
        td, logged = self.temporal_difference(batch, features, value)
        if self.noisy is None:
            return Losses(td, logged, next_action)
        noisy = self._noisy_loss(batch, features, draws, self.noisy)
        terms = {**logged, "noisy_critic_loss": noisy.detach()}
        return Losses(td + self.noisy.noisy_weight * noisy, terms, next_action)

    @torch.no_grad()
    def guided(self, context: Context, x_0: Tensor) -> Tensor:
        """The guided flow's chunk from this noise: (B, H, A) -> (B, H, A)."""
        policy, grid = self.policy, TimeGrid(self.policy.num_flow_steps)
        features, x = policy.features(context), x_0
        for i in range(grid.num_flow_steps):
            tau = full_tau(grid.tau(i), x)
            velocity = policy.base_velocity(x, tau, context)
            if i:  # at tau = 0 the push is infinite; it is left out
                velocity = velocity + self.push(features, x, grid.tau(i))
            x = torch.add(x, velocity, alpha=grid.step_size)
        return x

    def push(self, features: Tensor, x: Tensor, tau: float) -> Tensor:
        """What the guidance adds to the velocity; what is not executed follows the base alone.

        Args:
            features: (B, F).
            x: noisy chunks, (B, H, A).
            tau: their time, above 0.
        """
        config, real = self.config, self.policy.executed(x.detach(), clip=False)
        asked = 1.0 if self.noisy is None else tau
        with torch.enable_grad():
            point = real.clone().requires_grad_(True)
            q = self.critic.online(features, point, tau=full_tau(asked, real), frozen=True)
            with own_precision(point):
                (slope,) = torch.autograd.grad(q.mean(dim=0).sum(), point)
        score = (1.0 - tau) * config.inverse_temperature * slope
        return self.policy.embedded((config.guidance / tau) * (score + real))

    def _noisy_loss(
        self, batch: TransitionBatch[Any], features: Tensor, draws: Draws, knobs: CGQLLConfig
    ) -> Tensor:
        policy, tau = self.policy, draws["noisy_tau"]
        x, _ = flow_matching_target(batch.action, draws["noisy_x_0"], tau)
        with torch.no_grad():
            known = self.critic.target(features, policy.executed(batch.action, clip=False))
        q = self.critic.online(features, policy.executed(x, clip=False), tau=tau)
        if knobs.noisy_loss == "mse":
            error = (q - known).square()
        else:
            error = linex(q, known, knobs.inverse_temperature, knobs.linex_clip)
        return (error * td_weight(batch, policy.executed_length)).mean()


def linex(q: Tensor, known: Tensor, inverse_temperature: float, clip: float) -> Tensor:
    """``exp(d) + beta q`` where ``d = beta (known - q) <= clip``, else ``d``; any shape.

    Its minimum over q, for known values that vary, is ``log E[exp(beta known)] / beta``. Where it
    is clipped the slope jumps from ``beta (1 - e^clip)`` to ``-beta``.
    """
    d = inverse_temperature * (known - q)
    return torch.where(d > clip, d, d.clamp(max=clip).exp() + inverse_temperature * q)

r"""SAC Flow: soft actor-critic through the unrolled steps of a gated flow (Zhang et al., 2025).

It acts by a velocity network of its own, "Flow-G", whose gate keeps gradients through K chained
steps from growing as it does in a GRU: ``v = sigmoid(g(s, x, tau)) (u(s, x, tau) - x)``, with g 5
at first. A pretrained field has no such gate: *its weights are not used*, the network is trained
from the data. With ``eps ~ N(0, I)``:

    ``x <- x + v / K + sigma eps``, K times;  ``a = tanh(x)``
    ``log pi = log N(x_0) + sum_i log N(step i) - sum log(1 - a^2)``, of the whole *path*

``L = L_Q + alpha log pi(a) - mean_j Q_j(s, a) + w mean (a - a_data)^2 + L_FM + alpha (H - H*)``,
where alpha in the middle and H in the last term are numbers, the last term moves alpha alone, and
``y = R + gamma^n (Qbar(s', a') - alpha log pi(a'))``. L_FM is flow matching of v.

sigma is a setting, so all of log pi but the last sum is noise that no weight moves: the entropy
that is regularised is the squash's, ``E sum log(1 - a^2)``. See ``relative_entropy``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_loss, flow_matching_target
from vla_trqam.methods.base import Actor, FlowActor, Noise, Requirements, Which
from vla_trqam.methods.dsrl import Temperature
from vla_trqam.methods.parts.entropy import check_entropy_target
from vla_trqam.methods.parts.off_policy import (
    Draws,
    Losses,
    OffPolicyConfig,
    SummedLosses,
    draw_cloning,
)
from vla_trqam.networks import MLP
from vla_trqam.policy import Context
from vla_trqam.precision import own_precision
from vla_trqam.time_grid import full_tau

FIELD, TEMPERATURE = "gated_field", "temperature"
GATE_AT_FIRST = 5.0
CLONED_LIMIT = 0.99
"""Actions are brought within this before atanh, which is infinite at 1."""


@dataclass(frozen=True)
class SACFlowConfig(OffPolicyConfig):
    """Knobs of SAC Flow.

    Attributes:
        num_steps: K of its own flow.
        step_noise: sigma of the path that the actor's loss goes back through.
        acting_noise: sigma of the path that acts, in the TD target too.
        bc_weight: of the squared distance of its actions to the data's, a mean over numbers.
        cloning_weight: of flow matching.
        clone_through_tanh: flow matching regresses onto atanh of the data, so that what acts after
            tanh is the data; otherwise onto the data itself, as in the authors' code.
        initial_temperature: alpha at first.
        target_entropy: H* for each number of a chunk.
        relative_entropy: count the entropy from that of the path's noise, which no weight moves, so
            that it is at most 0; otherwise all of it, as in the authors' code.
        hidden_dims: widths of the velocity network's hidden layers.
        gate_dim: width of the gate's hidden layer.
        layer_norm: normalise after every activation of the velocity network.
        train_base: false, which it always is.
    """

    num_steps: int = 4
    step_noise: float = 0.05
    acting_noise: float = 0.02
    bc_weight: float = 100.0
    cloning_weight: float = 1.0
    clone_through_tanh: bool = True
    initial_temperature: float = 0.2
    target_entropy: float = -1.0
    relative_entropy: bool = True
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    gate_dim: int = 256
    layer_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "gate_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("step_noise", "acting_noise", "initial_temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        for name in ("bc_weight", "cloning_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite, not negative")
        check_entropy_target(self.target_entropy)
        if self.train_base:
            raise UserError("train_base is true, but sac_flow has no use for the policy's base")

    @property
    def notice(self) -> str:
        """That nothing of a pretrained field is used."""
        return (
            "sac_flow acts by a velocity network of its own, trained from the data: the pretrained "
            "field is not used, only compared with"
        )


class GatedField(nn.Module):
    """``v = sigmoid(g) (u - x)``: Flow-G.

    Args:
        feature_dim: width of the observation features.
        size: numbers in a chunk.
        config: the networks' shapes.
    """

    def __init__(self, feature_dim: int, size: int, config: SACFlowConfig) -> None:
        super().__init__()
        width = feature_dim + size + 1
        self.aim = MLP(width, size, config.hidden_dims, layer_norm=config.layer_norm)
        self.gate_in = nn.Linear(width, config.gate_dim)
        self.gate_out = nn.Linear(config.gate_dim, size)
        nn.init.xavier_uniform_(self.gate_in.weight)
        nn.init.zeros_(self.gate_in.bias)
        nn.init.zeros_(self.gate_out.weight)
        nn.init.constant_(self.gate_out.bias, GATE_AT_FIRST)

    def velocity(self, x: Tensor, tau: Tensor, features: Tensor) -> Tensor:
        """``v(x, tau; s)``: x (B, n, a), tau (B,), features (B, F) -> (B, H, a)."""
        flat = x.flatten(1)
        inputs = torch.cat([features, flat, tau.unsqueeze(1)], dim=1)
        inputs = inputs.to(self.gate_in.weight.dtype)
        with own_precision(inputs):
            gate = self.gate_out(F.silu(self.gate_in(inputs))).sigmoid()
        return (gate * (self.aim(inputs) - flat)).view_as(x)


def noisy_path(
    field: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """The flow's noisy steps, squashed, with the graph through all of them.

    Args:
        field: ``v(x, tau)``.
        noise: standard normal, (B, 1 + K, H, A): the start and every step's.
        sigma: of a step's noise.

    Returns:
        ``tanh(x_K)``, (B, H, A), and the path's log-density, (B,).
    """
    x, *steps = noise.unbind(1)
    for i, eps in enumerate(steps):
        x = x + field(x, full_tau(i / len(steps), x)) / len(steps) + sigma * eps
    squash = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))  # log(1 - tanh(x)^2)
    count, each = x[0].numel(), 0.5 * math.log(2.0 * math.pi)
    constant = count * ((1 + len(steps)) * each + len(steps) * math.log(sigma))
    normal = -0.5 * noise.flatten(1).square().sum(dim=1) - constant
    return x.tanh(), normal - squash.flatten(1).sum(dim=1)


def noise_entropy(count: int, num_steps: int, sigma: float) -> float:
    """Of the path's noise: what its entropy would be without the squash."""
    return count * (
        0.5 * (1 + num_steps) * math.log(2.0 * math.pi * math.e) + num_steps * math.log(sigma)
    )


@dataclass(frozen=True)
class PathActor:
    """The end of a noisy path of the method's own flow.

    Attributes:
        method: whose.
    """

    method: SACFlow

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`; what is not executed is zero."""
        method = self.method
        count = 1 + method.config.num_steps
        drawn = [noise.normal(method.policy.chunk_shape) for _ in range(count)]
        features = method.policy.features(context)
        action, _ = method.path(features, torch.stack(drawn, 1), method.config.acting_noise)
        return method.policy.embedded(action)


class SACFlow(SummedLosses):
    """See the module.

    Its TD target wants the path of the next action, not its end alone, and takes no chunk that was
    drawn before.
    """

    requirements = Requirements(
        trains_field=False,
        next_actions=False,
        host_acts=False,
        soft_values=True,
        own_field=True,
    )
    config: SACFlowConfig

    def make_networks(self) -> dict[str, nn.Module]:
        """The velocity network and the temperature."""
        temperature = Temperature()
        nn.init.constant_(temperature.log_value, math.log(self.config.initial_temperature))
        field = GatedField(self.policy.feature_dim, self.policy.executed_size, self.config)
        return {FIELD: field, TEMPERATURE: temperature}

    def values(self) -> tuple[str, ...]:
        """None beside the critic."""
        return ()

    @property
    def field(self) -> GatedField:
        """Its own."""
        network = self.own[FIELD]
        assert isinstance(network, GatedField)
        return network

    def actor(self, which: Which = "tuned") -> Actor:
        """Its own flow; the base is the policy's."""
        return FlowActor(self.policy, "base") if which == "base" else PathActor(self)

    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """The two paths' noise, and the cloning's."""
        rows, *shape = batch.action.shape
        paths = batch.action.new_empty((rows, 2, 1 + self.config.num_steps, *shape))
        following, actor = paths.normal_(generator=generator).unbind(1)
        return {"next": following, "actor": actor, **draw_cloning(batch.action, generator)}

    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """See the module."""
        policy, config, alpha = self.policy, self.config, self.own[TEMPERATURE]()
        features = policy.features(policy.encode(batch.observation))
        critic = self.critic_losses(batch, draws)
        action, log_p = self.path(features, draws["actor"], config.step_noise)
        q = self.critic.online(features, action, frozen=True).mean(dim=0)
        distance = (action - policy.executed(batch.action, clip=False)).square()
        valid = batch.valid[:, : policy.executed_length]
        distance = (distance * valid.unsqueeze(-1)).mean()
        actor = (alpha.detach() * log_p - q).mean() + config.bc_weight * distance
        entropy = -log_p.detach().mean()
        wanted = config.target_entropy * policy.executed_size
        cloning = self._flow_matching(batch, features, draws)
        loss = critic.loss + actor + config.cloning_weight * cloning + alpha * (entropy - wanted)
        terms = {
            "actor_loss": actor.detach(),
            "actor_q": q.detach().mean(),
            "action_bc_loss": distance.detach(),
            "bc_loss": cloning.detach(),
            "entropy": entropy,
            "temperature": alpha.detach(),
        }
        return Losses(loss, {**critic.logged, **terms})

    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The TD loss."""
        policy = self.policy
        with torch.no_grad():
            following = policy.features(policy.encode(batch.next_observation))
            action, log_p = self.path(following, draws["next"], self.config.acting_noise)
            value = self.critic.next_value(following, action) - self.own[TEMPERATURE]() * log_p
        features = policy.features(policy.encode(batch.observation))
        return Losses(*self.temporal_difference(batch, features, value))

    def path(self, features: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Executed chunks (B, n, a) and ``log pi`` (B,), from noise (B, 1 + K, H, A)."""
        drawn = self.policy.executed(noise, clip=False)
        velocity = self.field.velocity
        action, log_p = noisy_path(lambda x, tau: velocity(x, tau, features), drawn, sigma)
        if self.config.relative_entropy:
            log_p = log_p + noise_entropy(action[0].numel(), self.config.num_steps, sigma)
        return action, log_p

    def _flow_matching(self, batch: TransitionBatch[Any], features: Tensor, draws: Draws) -> Tensor:
        policy, tau = self.policy, draws["bc_tau"]
        real = policy.executed(batch.action, clip=False)
        if self.config.clone_through_tanh:
            real = real.clamp(-CLONED_LIMIT, CLONED_LIMIT).atanh()
        x_0 = policy.executed(draws["bc_x_0"], clip=False)
        x_tau, velocity = flow_matching_target(real, x_0, tau)
        predicted = self.field.velocity(x_tau, tau, features)
        return flow_matching_loss(predicted, velocity, batch.valid[:, : policy.executed_length])

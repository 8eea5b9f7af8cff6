"""Q-learning with adjoint matching: the update that TRQAM and QAM share, up to the gradient.

:class:`TRQAMLoss` is the algorithm box, one call a line, as one ``nn.Module`` whose ``forward``
returns the scalar, so that distributed wrappers see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vla_trqam.adjoint import AdjointKind, lean_adjoint, scalar_adjoint
from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import (
    adjoint_matching_loss,
    flow_matching_loss,
    flow_matching_target,
    td_loss,
    td_target,
)
from vla_trqam.methods.parts.off_policy import Draws, Losses, rows_of, slices, td_weight
from vla_trqam.methods.parts.results import CriticLossOutput, LossOutput
from vla_trqam.policy import Context, FlowPolicy, PathFields
from vla_trqam.sde import sample_ode, sample_path_and_next_action
from vla_trqam.time_grid import Scheme, TimeGrid
from vla_trqam.trust_region import path_kl_per_step


class Knobs(Protocol):
    """What of a method's config the update up to the gradient depends on."""

    @property
    def chain(self) -> Scheme:
        """How the memoryless SDE is discretised."""

    @property
    def adjoint(self) -> AdjointKind:
        """Through the base's Jacobians, or without them."""

    @property
    def adjoint_scale(self) -> float:
        """Factor of the terminal adjoint."""

    @property
    def keep_activations(self) -> bool:
        """Of every flow step, until its gradients are taken."""

    @property
    def clone_interventions(self) -> float:
        """Weight of the tuned field's flow-matching loss where a person acted."""

    @property
    def loss_steps(self) -> int | None:
        """How many of the flow steps the loss takes; None for all."""

    @property
    def train_base(self) -> bool:
        """Whether the base keeps training."""


@dataclass(frozen=True)
class UpdateNoise:
    """Every random number of one update.

    Attributes:
        next_action: start of the ODE that samples the next action chunk, (B, H, A).
        sde_x_0: start of the memoryless SDE, (B, H, A).
        sde_steps: its unit increments, (K, B, H, A); the last, where the chain's last step has no
            noise, is what makes the critic's gradient wrong on purpose.
        bc_x_0: noise of the flow-matching loss, (B, H, A).
        bc_tau: its times, uniform on [0, 1), (B,).
        more: a method's own by name, (B, ...) each.
        loss_steps: numbers of the flow steps that the loss takes; None for all.
    """

    next_action: Tensor
    sde_x_0: Tensor
    sde_steps: Tensor
    bc_x_0: Tensor
    bc_tau: Tensor
    more: Draws = field(default_factory=dict)
    loss_steps: tuple[int, ...] | None = None

    @classmethod
    def draw(cls, action: Tensor, num_flow_steps: int, generator: torch.Generator) -> UpdateNoise:
        """Fresh noise for a batch of action chunks (B, H, A)."""
        batch = action.shape[0]
        normal = torch.empty((num_flow_steps + 3, *action.shape), device=action.device)
        normal.normal_(generator=generator)
        tau = torch.empty(batch, device=action.device).uniform_(generator=generator)
        return cls(normal[0], normal[1], normal[3:], normal[2], tau)

    def rows(self, rows: slice) -> UpdateNoise:
        """Of these rows of the batch."""
        return UpdateNoise(
            self.next_action[rows],
            self.sde_x_0[rows],
            self.sde_steps[:, rows],
            self.bc_x_0[rows],
            self.bc_tau[rows],
            {name: value[rows] for name, value in self.more.items()},
            self.loss_steps,
        )


class TRQAMLoss(nn.Module):
    """The update's scalar loss as a module over policy and critic.

    A method of the family overrides a small step of it: :meth:`matching`, :meth:`terminal_adjoint`,
    :meth:`critic_terms`, :meth:`next_action`, or adds to it: :meth:`more_terms` with
    :meth:`draw_more`, and :meth:`make_networks`.
    """

    def __init__(self, policy: FlowPolicy, critic: Critic, config: Any) -> None:
        super().__init__()
        self.policy, self.critic, self.config = policy, critic, config
        self.grid = TimeGrid(policy.num_flow_steps, config.chain)
        last = self.grid.steps[-1]  # refuses a grid that is too coarse
        if critic.gradient_noise > 0.0 and not last.sampled_with_base:
            raise UserError(
                f"critic.gradient_noise is {critic.gradient_noise}, but it takes the noise of the "
                "chain's last step, which final_step='sde' uses: take 'noiseless_base'"
            )
        taken, steps = config.loss_steps, self.grid.num_flow_steps
        if taken is not None and taken > steps:
            raise UserError(
                f"loss_steps is {taken}; the policy has {steps} flow steps, some of which the loss "
                "takes"
            )
        device = next(critic.parameters()).device
        self.own = nn.ModuleDict({k: v.to(device) for k, v in self.make_networks().items()})

    config: Any
    """The knobs, of the method's own kind: :class:`Knobs` and what it adds."""
    wants_next: ClassVar[bool] = True
    """Whether its critic's target is made of an action at the next observation."""

    def make_networks(self) -> dict[str, nn.Module]:
        """Networks beside policy and critic, by the name that they are saved under.

        They take part in the actor's step and clip.
        """
        return {}

    def draw(self, action: Tensor, num_flow_steps: int, generator: torch.Generator) -> UpdateNoise:
        """The noise of an update on chunks (B, H, A); without flow steps, of the critic alone."""
        noise = UpdateNoise.draw(action, num_flow_steps, generator)
        chosen = self._draw_steps(num_flow_steps, generator)
        return replace(noise, more=self.draw_more(action, generator), loss_steps=chosen)

    def _draw_steps(
        self, num_flow_steps: int, generator: torch.Generator
    ) -> tuple[int, ...] | None:
        """The m flow steps that the loss takes, any m as likely; None where it takes all."""
        count = self.config.loss_steps
        if count is None or count >= num_flow_steps:  # all, or none of a critic's own update
            return None
        order = torch.randperm(num_flow_steps, generator=generator, device=generator.device)
        return tuple(sorted(order[:count].tolist()))

    def draw_more(self, action: Tensor, generator: torch.Generator) -> Draws:
        """The method's own random numbers."""
        return {}

    def forward(self, batch: TransitionBatch, noise: UpdateNoise, lam: float) -> LossOutput:
        """Algorithm 2 up to the gradient step."""
        policy, grid = self.policy, self.grid
        context = policy.encode(batch.observation)
        next_context = policy.encode(batch.next_observation)
        features = policy.features(context)

        fields = policy.path_fields(
            context, next_context, keep_activations=self.config.keep_activations
        )
        trajectory, next_chunk = sample_path_and_next_action(
            fields,
            noise.sde_x_0,
            noise.sde_steps,
            noise.next_action if self.wants_next and batch.next_action is None else None,
            grid,
            jacobians=self.config.adjoint == "lean",
            trained=noise.loss_steps,
        )
        next_action = batch.next_action
        if next_chunk is not None:
            next_action = self.next_action(next_context, next_chunk, noise)

        critic = self.critic_terms(batch, features, next_context, next_action)

        spare = noise.sde_steps[-1]  # of the step without noise
        terminal_adjoint, ends = self.terminal_adjoint(features, trajectory.x_1, spare)
        adjoint = self._adjoint(terminal_adjoint, fields)

        control_gap = fields.tuned() - fields.base()
        weights = self._weights(noise.loss_steps, control_gap)
        am = self.matching(control_gap, adjoint, lam, weights)
        loss = critic.loss + am
        bc = self._behaviour_cloning(batch, noise, context) if self.config.train_base else None
        loss = loss if bc is None else loss + bc
        cloned = self._cloned_interventions(batch, noise, context)
        loss = loss if cloned is None else loss + self.config.clone_interventions * cloned
        told = {} if cloned is None else {"intervention_loss": cloned.detach()}
        more = self.more_terms(noise, context, features)
        loss = loss if more is None else loss + more.loss
        return LossOutput(
            loss=loss,
            td_loss=critic.td_loss,
            adjoint_loss=am.detach(),
            bc_loss=None if bc is None else bc.detach(),
            kl_per_step=path_kl_per_step(control_gap, grid),
            last_gap=control_gap[-1].detach(),
            q=critic.q,
            target=critic.target,
            trajectory=trajectory,
            adjoint=adjoint,
            terminal_adjoint=terminal_adjoint,
            next_action=next_action,
            more={**critic.more, **ends, **told, **({} if more is None else more.logged)},
        )

    def next_action(self, next_context: Context, chunk: Tensor, noise: UpdateNoise) -> Tensor:
        """What is executed at the next observations, of the flow's chunk there: (B, n, a)."""
        return self.policy.executed(chunk)

    def terminal_adjoint(
        self, features: Tensor, x_1: Tensor, spare: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Minus the slope of what is maximised at the path's end, (B, H, A); what is logged.

        Args:
            features: of the observations, (B, F).
            x_1: the path's ends, (B, H, A).
            spare: standard normal numbers that the chain has not used, (B, H, A).
        """
        gradient, _ = self.critic.action_gradient(features, x_1, self.policy.executed, spare)
        return -self.config.adjoint_scale * gradient, {}

    def _adjoint(self, terminal_adjoint: Tensor, fields: PathFields) -> Tensor:
        if self.config.adjoint == "scalar":
            return scalar_adjoint(terminal_adjoint, self.grid)
        return lean_adjoint(terminal_adjoint, fields.base_pullback, self.grid)

    def matching(
        self, control_gap: Tensor, adjoint: Tensor, lam: float, weights: Tensor | None = None
    ) -> Tensor:
        """The regression of the fields' difference onto the adjoint, (K, B, H, A) both.

        Args:
            control_gap: the difference along the path.
            adjoint: paired with each step.
            lam: lambda.
            weights: of the steps, (K,); None for 1.
        """
        return adjoint_matching_loss(control_gap, adjoint, self.grid, lam, weights)

    def _weights(self, chosen: tuple[int, ...] | None, like: Tensor) -> Tensor | None:
        """K / m for the m steps that the loss takes, and 0 for the others; None where all are."""
        if chosen is None:
            return None
        weights = like.new_zeros(self.grid.num_flow_steps)
        weights[list(chosen)] = self.grid.num_flow_steps / len(chosen)
        return weights

    def more_terms(self, noise: UpdateNoise, context: Context, features: Tensor) -> Losses | None:
        """The method's own terms of the loss; None where it has none."""
        return None

    def critic_loss(self, batch: TransitionBatch, noise: UpdateNoise) -> CriticLossOutput:
        """The TD part alone, with the next action as in :meth:`forward`."""
        policy = self.policy
        context = policy.encode(batch.observation)
        next_context, next_action = policy.encode(batch.next_observation), batch.next_action
        if next_action is None:
            with torch.no_grad():
                x_1 = sample_ode(
                    lambda x, tau: policy.velocity(x, tau, next_context),
                    noise.next_action,
                    self.grid,
                )
            next_action = self.next_action(next_context, x_1, noise)
        return self.critic_terms(batch, policy.features(context), next_context, next_action)

    def critic_terms(
        self,
        batch: TransitionBatch,
        features: Tensor,
        next_context: Context,
        next_action: Tensor | None,
    ) -> CriticLossOutput:
        """The TD loss at the action that is executed at the next observation."""
        policy = self.policy
        assert next_action is not None
        next_value = self.critic.next_value(policy.features(next_context), next_action)
        target = td_target(batch.chunk_return, batch.discount, batch.terminated, next_value)
        # What was executed is within the limits.
        q = self.critic.online(features, policy.executed(batch.action, clip=False))
        td = td_loss(q, target, td_weight(batch, policy.executed_length))
        return CriticLossOutput(td, td.detach(), q.detach(), target)

    def _cloned_interventions(
        self, batch: TransitionBatch, noise: UpdateNoise, context: Context
    ) -> Tensor | None:
        """The tuned field's flow-matching loss where a person acted; None where that is not asked.

        A mean over all actions of the batch, of which the others weigh nothing.
        """
        if not self.config.clone_interventions:
            return None
        policy, taken = self.policy, batch.intervened
        assert taken is not None, "no column tells of interventions"
        x_tau, target = flow_matching_target(batch.action, noise.bc_x_0, noise.bc_tau)
        velocity = policy.velocity(x_tau, noise.bc_tau, context).to(x_tau.dtype)
        return flow_matching_loss(policy.real_actions(velocity), policy.real_actions(target), taken)

    def _behaviour_cloning(
        self, batch: TransitionBatch, noise: UpdateNoise, context: Context
    ) -> Tensor:
        x_tau, velocity = flow_matching_target(batch.action, noise.bc_x_0, noise.bc_tau)
        predicted = self.policy.behaviour_velocity(x_tau, noise.bc_tau, context)
        return flow_matching_loss(predicted, velocity, batch.valid)


Part = tuple[TransitionBatch[Any], UpdateNoise]
"""A micro-batch and its noise."""


def micro_batches(batch: TransitionBatch[Any], noise: UpdateNoise, count: int) -> Sequence[Part]:
    """A batch and its noise in ``count`` parts.

    Raises:
        UserError: there are fewer rows than parts.
    """
    if count == 1:
        return [(batch, noise)]
    return [(rows_of(batch, rows), noise.rows(rows)) for rows in slices(len(batch), count)]


def sampled_fields(policy: FlowPolicy, context: Any, rows: int, config: Knobs) -> PathFields:
    """Both fields along a path of the chain from torch's own noise, activations kept.

    Args:
        policy: whose fields.
        context: of the observations.
        rows: how many these are.
        config: the chain and its adjoint.
    """
    grid = TimeGrid(policy.num_flow_steps, config.chain)
    device = next(policy.parameters()).device
    noise = torch.randn((grid.num_flow_steps + 2, rows, *policy.chunk_shape), device=device)
    fields = policy.path_fields(context, context)
    lean = config.adjoint == "lean"
    some = None if config.loss_steps is None else range(config.loss_steps)
    sample_path_and_next_action(
        fields, noise[0], noise[2:], noise[1], grid, jacobians=lean, trained=some
    )
    return fields

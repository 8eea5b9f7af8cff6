"""TRQAM for large policies: many updates of the critic for each one of the policy.

The critic's batches hold cached features and use next actions that were drawn before
(:class:`~vla_trqam.engine.next_actions.NextActions`); the policy's own update draws its next
actions afresh and leaves them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vla_trqam.data.sampling import ChunkSampler, MixedSampler
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.learners import CriticWarmup, OffPolicy, average_of
from vla_trqam.engine.next_actions import FRAME, NextActions
from vla_trqam.engine.processes.team import micro_batches
from vla_trqam.methods.trqam import TRQAM, UpdateNoise
from vla_trqam.policy import FlowPolicy


class TrainedWeights(nn.Module):
    """The weights of a policy that are trained, and no others: what a checkpoint needs.

    Their names have ``/`` where the policy's have a dot.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


class CachedOffPolicy(OffPolicy):
    """One update of the policy and the critic, then more of the critic alone.

    Args:
        method: TRQAM or QAM.
        next_actions: of the replay's frames.
        sampler: of the critic's batches, whose observations are numbered features.
        critic_updates: of the critic alone, after each update of the policy.
        batch_size: of the critic's batches.
        redraws: frames whose oldest next action is drawn anew after each update of the policy.
        num_micro_batches: the policy's update takes its batch in so many parts, in less memory.
    """

    # They are of the frames of the process's own replay.
    own_modules = frozenset({"next_actions"})

    def __init__(
        self,
        method: TRQAM,
        next_actions: NextActions,
        sampler: ChunkSampler[Any] | MixedSampler[Any],
        *,
        critic_updates: int,
        batch_size: int,
        redraws: int = 0,
        num_micro_batches: int = 1,
    ) -> None:
        super().__init__(method)
        self.next_actions, self.sampler = next_actions, sampler
        self.critic_updates, self.batch_size = critic_updates, batch_size
        self.redraws = redraws
        self.num_micro_batches = num_micro_batches
        self._trained = TrainedWeights(method.policy)

    def update(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """One update of the method, then the critic's."""
        self.next_actions.fill(generator)
        noise = UpdateNoise.draw(batch.action, self.method.policy.num_flow_steps, generator)
        parts = micro_batches(batch, noise, self.num_micro_batches)
        self._result = self.method.update_in_parts(parts)
        frames = batch.next_observation[FRAME]
        chunks = torch.cat([output.next_action for output in self._result.outputs])
        self.next_actions.put(frames, chunks, generator)
        self.next_actions.policy_moved()
        if self.redraws:
            self.next_actions.redraw(self.redraws, generator)
        for _ in range(self.critic_updates):
            drawn = self.sampler.sample(self.batch_size, generator).to(frames.device)
            own = replace(drawn, action=self.method.policy.from_robot(drawn.action))
            cached_critic_update(self.method, self.next_actions, own, generator)

    def metrics(self) -> dict[str, float]:
        """The method's, and how old the next actions are."""
        age = self.next_actions.mean_age
        return super().metrics() | ({} if age is None else {"next_action_age": age})

    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained of the policy, the critic, and the next actions."""
        return {
            "policy": self._trained,
            "critic": self.method.critic,
            "next_actions": self.next_actions,
            **average_of(self.method),
        }


class CachedCriticWarmup(CriticWarmup):
    """The critic of a :class:`CachedOffPolicy` by itself, before its policy moves."""

    own_modules = CachedOffPolicy.own_modules

    def __init__(self, learner: CachedOffPolicy) -> None:
        super().__init__(learner)
        self._learner = learner

    def update(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """One update of the critic."""
        self._learner.next_actions.fill(generator)
        self._critic_result = cached_critic_update(
            self.method, self._learner.next_actions, batch, generator
        )

    def modules(self) -> Mapping[str, nn.Module]:
        """As the learner's."""
        return self._learner.modules()


def cached_critic_update(
    method: TRQAM,
    next_actions: NextActions,
    batch: TransitionBatch[Any],
    generator: torch.Generator,
) -> Any:
    """One update of the critic at next actions that were drawn before."""
    chunks = next_actions.pick(batch.next_observation[FRAME], generator)
    noise = UpdateNoise.draw(batch.action, 0, generator)
    return method.update_critic(batch, noise, chunks)

"""Methods for large policies: many updates of the critic for each one of the policy.

The critic's batches hold cached features and, where the method's target wants them, use next
actions that were drawn before (:class:`~vla_trqam.engine.next_actions.NextActions`); the policy's
own update draws its next actions afresh and leaves them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vla_trqam.data.feature_cache import FRAME
from vla_trqam.data.sampling import ChunkSampler, MixedSampler
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.next_actions import NextActions
from vla_trqam.methods.base import Actor, OffPolicyMethod, Scalars, Which
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


class Around(OffPolicyMethod):
    """Another method with something around it; what is not said here is that one's."""

    def __init__(self, method: OffPolicyMethod) -> None:
        self.method = method
        self.policy, self.critic = method.policy, method.critic
        self.optimizer = method.optimizer
        self.requirements = method.requirements  # type: ignore[misc]
        self.own_modules = method.own_modules

    @property
    def step_factor(self) -> float:
        """The method's."""
        return self.method.step_factor

    @step_factor.setter
    def step_factor(self, factor: float) -> None:
        self.method.step_factor = factor

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """The method's."""
        self.method.update(batch, generator, num_parts=num_parts)

    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """The method's."""
        self.method.update_critic(batch, generator)

    def metrics(self) -> dict[str, float]:
        """The method's."""
        return self.method.metrics()

    def critic_metrics(self) -> dict[str, float]:
        """The method's."""
        return self.method.critic_metrics()

    def modules(self) -> Mapping[str, nn.Module]:
        """The method's."""
        return self.method.modules()

    def actor(self, which: Which = "tuned") -> Actor:
        """The method's."""
        return self.method.actor(which)

    def acting(self) -> AbstractContextManager[None]:
        """The method's."""
        return self.method.acting()

    def present(self, wanted: bool = True) -> AbstractContextManager[None]:
        """The method's."""
        return self.method.present(wanted)

    def scalars(self) -> Scalars:
        """The method's."""
        return self.method.scalars()

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """The method's."""
        self.method.load_scalars(values)

    def first_actor(self) -> Actor:
        """The method's."""
        return self.method.first_actor()

    def score(self, features: Tensor, action: Tensor) -> Tensor:
        """The method's."""
        return self.method.score(features, action)

    @property
    def kl_unit(self) -> str:
        """The method's."""
        return self.method.kl_unit


class CriticOnly(Around):
    """The critic of a method by itself, before its policy moves."""

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One update of the critic."""
        assert num_parts == 1, "the critic takes its batch whole"
        self.method.update_critic(batch, generator)

    def metrics(self) -> dict[str, float]:
        """The critic's."""
        return self.method.critic_metrics()


class Cached(Around):
    """One update of the policy and the critic, then more of the critic alone.

    Args:
        method: the method.
        next_actions: of the replay's frames; None where the method's target wants none.
        sampler: of the critic's batches, whose observations are numbered features.
        critic_updates: of the critic alone, after each update of the policy.
        batch_size: of the critic's batches.
        redraws: frames whose oldest next action is drawn anew after each update of the policy.
        draws_next: the policy's update draws its batch's next actions; otherwise it takes those
            kept, which needs no prefix of the next frames, and new ones are drawn at the batch's
            own frames, whose prefixes are there (and at those of the next ones where no chunk
            begins, which no batch would renew).
        num_micro_batches: the policy's update takes its batch in so many parts, in less memory.
    """

    def __init__(
        self,
        method: OffPolicyMethod,
        next_actions: NextActions | None,
        sampler: ChunkSampler[Any] | MixedSampler[Any],
        *,
        critic_updates: int,
        batch_size: int,
        redraws: int = 0,
        draws_next: bool = True,
        num_micro_batches: int = 1,
    ) -> None:
        super().__init__(method)
        assert (next_actions is not None) == method.requirements.next_actions
        self.next_actions, self.sampler = next_actions, sampler
        self.critic_updates, self.batch_size = critic_updates, batch_size
        self.redraws, self.draws_next = redraws, draws_next
        self.num_micro_batches = num_micro_batches
        # They are of the frames of the process's own replay.
        self.own_modules = frozenset({"next_actions"} if next_actions is not None else ())
        self._trained = TrainedWeights(method.policy)

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One update of the method, then the critic's."""
        self._fill(generator)
        batch = batch if self.draws_next else self._with_next_actions(batch, generator)
        self.method.update(batch, generator, num_parts=self.num_micro_batches)
        self._keep_next_actions(batch, generator)
        for _ in range(self.critic_updates):
            drawn = self.sampler.sample(self.batch_size, generator).to(batch.action.device)
            own = replace(drawn, action=self.policy.from_robot(drawn.action))
            self._update_critic(own, generator)

    def _keep_next_actions(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        if self.next_actions is None:
            return
        if self.draws_next and self.method.next_action is not None:
            frames = batch.next_observation[FRAME]
            self.next_actions.put(frames, self.method.next_action, generator)
        self.next_actions.policy_moved()
        with self.present(not self.draws_next or self.redraws > 0):
            if not self.draws_next:
                self.next_actions.draw_at(batch.observation, generator)
                going_on = batch.next_observation[FRAME][~batch.terminated]
                self.next_actions.draw_ends(going_on, self.sampler.start_rows, generator)
            if self.redraws:
                self.next_actions.redraw(self.redraws, generator)

    def _fill(self, generator: torch.Generator) -> None:
        """Chunks for the frames that have none: of all, at first, and of each rollout."""
        if self.next_actions is not None:
            with self.present(self.next_actions.num_missing > 0):
                self.next_actions.fill(generator)

    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """One update of the critic, at next actions that were drawn before."""
        self._fill(generator)
        self._update_critic(batch, generator)

    def _update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        self.method.update_critic(self._with_next_actions(batch, generator), generator)

    def _with_next_actions(
        self, batch: TransitionBatch[Any], generator: torch.Generator
    ) -> TransitionBatch[Any]:
        if self.next_actions is None:
            return batch
        chunks = self.next_actions.pick(batch.next_observation[FRAME], generator)
        return replace(batch, next_action=chunks)

    def metrics(self) -> dict[str, float]:
        """The method's, and how old the next actions are."""
        age = None if self.next_actions is None else self.next_actions.mean_age
        return super().metrics() | ({} if age is None else {"next_action_age": age})

    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained of the policy, the method's networks, and the next actions."""
        kept = {} if self.next_actions is None else {"next_actions": self.next_actions}
        return {**self.method.modules(), "policy": self._trained, **kept}

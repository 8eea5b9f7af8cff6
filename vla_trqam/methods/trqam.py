"""TRQAM: Trust Region Q-Adjoint Matching (Algorithm 2).

The update up to the gradient is :class:`~vla_trqam.methods.parts.adjoint_matching.TRQAMLoss`;
:class:`TRQAM` takes the step, measures the KL and moves lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import OffPolicyMethod, Requirements, Scalars
from vla_trqam.methods.parts.adjoint_matching import (
    Part,
    TRQAMLoss,
    UpdateNoise,
    micro_batches,
)
from vla_trqam.methods.parts.average import WeightAverage
from vla_trqam.methods.parts.finite import Terms, check_finite, measured
from vla_trqam.methods.parts.off_policy import joined
from vla_trqam.methods.parts.parallel import Ranks, clipped, whole, whole_moments
from vla_trqam.methods.parts.results import (
    CriticLossOutput,
    CriticUpdateResult,
    LossOutput,
    UpdateResult,
)
from vla_trqam.methods.trqam_config import FORMER_SCHEME, SchemeName, TRQAMConfig
from vla_trqam.policy import FlowPolicy
from vla_trqam.trust_region import TrustRegion

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "TRQAM",
    "CriticLossOutput",
    "CriticUpdateResult",
    "LossOutput",
    "SchemeName",
    "TRQAMConfig",
    "TRQAMLoss",
    "UpdateNoise",
    "UpdateResult",
]


SCHEME, LAMBDA, UNIT = "scheme", "lambda", "unit"
"""What a trust region's state belongs to: the chain, and what lambda is."""
INSIDE = "TRQAM's own"
ACTOR_NORM, CRITIC_NORM = "the actor's gradient norm", "the critic's gradient norm"
JOINT_NORM = "the joint gradient norm of actor and critic"


class TRQAM(OffPolicyMethod):
    """Off-policy fine-tuning of a flow policy under a KL budget.

    Args:
        policy: the policy; its tuned field is trained, its base field is the reference.
        critic: the critic ensemble.
        config: every knob.
        accelerator: of ``accelerate``, with several processes or bfloat16; policy and critic lie on
            its device, and take the weights of rank 0. Every rank then makes the same calls, each
            with its own share of the batch.
        shard: every rank keeps a part of the trained weights only; see :meth:`whole_weights`.

    Raises:
        UserError: what the accelerator or the config asks for is not possible.
    """

    requirements = Requirements(
        trains_field=True,
        next_actions=True,
        host_acts=True,
        paths=True,
        adjoint=True,
        can_shard=True,
    )
    loss_class: ClassVar[type[TRQAMLoss]] = TRQAMLoss
    """What a method of the family exchanges: a step of the loss, networks of its own."""
    lambda_is: ClassVar[str] = INSIDE
    """What lambda is to the loss; a state says it where it is not TRQAM's own."""

    def __init__(
        self,
        policy: FlowPolicy,
        critic: Critic,
        config: TRQAMConfig,
        accelerator: Accelerator | None = None,
        *,
        shard: bool = False,
    ) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        self.ranks = Ranks(accelerator, shard=shard)
        if config.train_base:
            policy.start_base_training()
        self.loss = self.make_loss()
        self._distribute()
        self.trust_region = TrustRegion(config, policy.executed_length)
        actor = [*policy.trainable_parameters(), *policy.behaviour_parameters()]
        actor += self.loss.own.parameters()
        critics = list(critic.online.parameters())
        apart = {ACTOR_NORM: actor, CRITIC_NORM: critics}
        self._clip_groups = {JOINT_NORM: actor + critics} if config.shared_optimizer else apart
        self.optimizer = torch.optim.Adam(
            [{"params": actor, "lr": config.actor_lr}, {"params": critics, "lr": config.critic_lr}],
            fused=True,
        )
        self._step_factor, self._present = 1.0, False
        rate = config.average_rate
        self.average = WeightAverage(policy.trainable_parameters(), rate) if rate else None
        self._result: UpdateResult | None = None
        self._critic_result: CriticUpdateResult | None = None

    def make_loss(self) -> TRQAMLoss:
        """The update up to the gradient, of the method's own kind."""
        return self.loss_class(self.policy, self.critic, self.config)

    @property
    def step_factor(self) -> float:
        """What the config's step sizes, the actor's and the critic's, are multiplied by."""
        return self._step_factor

    @step_factor.setter
    def step_factor(self, factor: float) -> None:
        self._step_factor = factor
        sizes = self.config.actor_lr, self.config.critic_lr
        for group, size in zip(self.optimizer.param_groups, sizes, strict=True):
            group["lr"] = factor * size

    def _distribute(self) -> None:
        """The same weights on every rank, or a part of them."""
        if not self.ranks.shard:
            self.ranks.synchronize(self.loss)
            return
        self.config.check_shard()
        if self.loss.own:
            beside = " and ".join(self.loss.own)
            raise UserError(f"shard: {beside} beside the policy cannot be sharded; set it to false")
        frozen = {p for p in self.loss.parameters() if not p.requires_grad}
        # The critic's target follows the online network shard by shard.
        frozen.difference_update(self.critic.target.parameters())
        forwards = {"forward": LossOutput, "critic_loss": CriticLossOutput}
        self.ranks.sharded(self.loss, frozen, forwards)

    @contextmanager
    def whole_weights(self, *, moments: bool = False) -> Iterator[None]:
        """Sharded weights are there inside, to act, evaluate or save; all ranks enter.

        Args:
            moments: the optimizer's state too, for a checkpoint.
        """
        with whole(self.loss), whole_moments(self.optimizer) if moments else nullcontext():
            yield

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that act; no update may be made there."""
        return self.present() if self.average is None else self.average.in_place()

    @contextmanager
    def present(self, wanted: bool = True) -> Iterator[None]:
        """Sharded weights are whole inside; see :meth:`Method.present`."""
        if not self.ranks.shard or self._present or not self.ranks.any(wanted):
            yield
            return
        self._present = True
        try:
            with self.whole_weights():
                yield
        finally:
            self._present = False

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One update of critic, tuned field, lambda and targets; see :meth:`Method.update`."""
        noise = self.loss.draw(batch.action, self.policy.num_flow_steps, generator)
        self._result = self.update_in_parts(micro_batches(batch, noise, num_parts))
        self.next_action = joined([output.next_action for output in self._result.outputs])

    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """Policy and lambda stand still; see :meth:`OffPolicyMethod.update_critic`."""
        noise = self.loss.draw(batch.action, 0, generator)
        self._critic_result = self.update_critic_with(batch, noise)

    def metrics(self) -> dict[str, float]:
        """The update's own and the trust region's."""
        assert self._result is not None, "metrics() before the first update()"
        values = self._result.metrics() | {"kl_ema": self.trust_region.kl_ema}
        if self.config.dual_step_size > 0.0:
            bounds = ("kl_budget", "lam_min", "lam_max")
            values |= {name: getattr(self.config, name) for name in bounds}
        return values

    def critic_metrics(self) -> dict[str, float]:
        """The last update's of the critic alone."""
        assert self._critic_result is not None, "critic_metrics() before the first update_critic()"
        return self._critic_result.metrics()

    def modules(self) -> Mapping[str, nn.Module]:
        """Policy, critic and the method's own, and the policy's average where that acts."""
        average = {} if self.average is None else {"average": self.average}
        own = dict(self.loss.own.items())
        return {"policy": self.policy, "critic": self.critic, **own, **average}

    def scalars(self) -> Scalars:
        """The trust region's state, and the chain and unit that it is of."""
        state = self.trust_region.state_dict()
        kind: Scalars = {} if self.lambda_is == INSIDE else {LAMBDA: self.lambda_is}
        of: Scalars = {SCHEME: self.config.scheme, UNIT: self._unit}
        return state | super().scalars() | of | kind

    @property
    def _unit(self) -> str:
        """What a nat and a lambda are, beside the scheme."""
        scale = self.config.adjoint_scale
        times = "" if scale == 1.0 else f", an adjoint times {scale:g}"
        return f"{self.kl_unit} of {self.policy.num_flow_steps} flow steps{times}"

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`.

        Raises:
            UserError: they are of another scheme or of another number of flow steps, whose KL is in
                other units, or of another lambda.
        """
        state = {name: float(values[name]) for name in self.trust_region.state_dict()}
        theirs, own = values.get(SCHEME, FORMER_SCHEME), self.config.scheme
        if theirs != own:
            raise UserError(
                f"lambda and its KL are of the {theirs} scheme and this run is of {own}, which has "
                f"other units: --method.scheme={theirs} goes on with them"
            )
        found = values.get(LAMBDA, INSIDE)
        if found != self.lambda_is:
            raise UserError(
                f"lambda there is {found} and this run's is {self.lambda_is}, which has other "
                "units: take a run of the same method"
            )
        unit = values.get(UNIT, self._unit)  # older checkpoints say none
        if unit != self._unit and self.config.dual_step_size > 0.0:
            raise UserError(
                f"lambda and its KL are of {unit}, and this run's of {self._unit}: take the same, "
                "or leave out --critic.path"
            )
        self.trust_region.load_state_dict(state)
        super().load_scalars(values)

    @property
    def kl_unit(self) -> str:
        """Nats of the chain, per action or per chunk."""
        return "nats per action" if self.config.kl_per_action else "nats per chunk"

    def update_critic_with(self, batch: TransitionBatch, noise: UpdateNoise) -> CriticUpdateResult:
        """:meth:`update_critic` with given noise.

        Args:
            batch: of chunks; this rank's.
            noise: of the update.

        Raises:
            DivergenceError: on every rank, before anything has moved.
        """
        (share,) = self.ranks.shares([len(batch)])
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.autocast():
            output = self.loss.critic_loss(batch, noise)
        self.ranks.reduce_after(self.loss, last=True)
        _weighed(output.loss, share).backward()
        parameters = list(self.critic.online.parameters())
        self.ranks.average_gradients(parameters)
        norm = clipped(parameters, self.config.max_grad_norm)
        self._checked({"the loss": ([output.loss], [share])}, {CRITIC_NORM: norm})
        self.critic.update_target()
        # Adam leaves alone what has no gradient.
        self.optimizer.step()
        return CriticUpdateResult(output, share, norm, self.ranks)

    def update_with(self, batch: TransitionBatch, noise: UpdateNoise) -> UpdateResult:
        """:meth:`update` with given noise.

        Args:
            batch: of chunks; this rank's.
            noise: of the update.
        """
        return self.update_in_parts([(batch, noise)])

    def update_in_parts(self, parts: Sequence[Part]) -> UpdateResult:
        """:meth:`update_with` on the joint batch of these micro-batches, one after the other.

        One step of the optimizer, of lambda and of the targets, as if the batch had been one: only
        the memory is that of a micro-batch.

        Raises:
            ValueError: see :meth:`Ranks.shares`.
            DivergenceError: on every rank, before anything has moved.
        """
        lam = self.trust_region.lam
        shares = self.ranks.shares([len(batch) for batch, _ in parts])
        self.optimizer.zero_grad(set_to_none=True)
        outputs = [
            self._backward(batch, noise, lam, share, last=number == len(parts))
            for number, ((batch, noise), share) in enumerate(zip(parts, shares, strict=True), 1)
        ]
        groups, most = self._clip_groups, self.config.max_grad_norm
        self.ranks.average_gradients(p for group in groups.values() for p in group)
        norms = {name: clipped(group, most) for name, group in groups.items()}
        # Averaged over ranks before lambda moves: it is the same on every rank, to the bit.
        found = self._checked(
            {
                "the path KL": ([output.kl_per_step.sum() for output in outputs], shares),
                "the loss": ([output.loss for output in outputs], shares),
            },
            norms,
        )
        # The targets follow the weights as they were before this step, as in the authors' code.
        self.critic.update_target()
        self.policy.update_base(self.config.base_ema_rate)
        self.optimizer.step()
        if self.average is not None:
            self.average.follow()
        kl = self.trust_region.in_budget_units(found["the path KL"])
        self.trust_region.update(kl)
        return UpdateResult(
            outputs, shares, lam, kl, [*norms.values()], self.policy.executed, self.ranks
        )

    def _checked(self, sums: Mapping[str, Terms], norms: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers of an update, all finite, before anything has moved."""
        terms = {name: ([norm], [1.0]) for name, norm in norms.items()}
        found = measured(self.ranks, {**sums, **terms})
        check_finite(found, f"at lambda {self.trust_region.lam:.3g}")
        return found

    def _backward(
        self, batch: TransitionBatch, noise: UpdateNoise, lam: float, share: float, *, last: bool
    ) -> LossOutput:
        """Adds a micro-batch's gradient."""
        with self.ranks.autocast():
            output: LossOutput = self.loss(batch, noise, lam)
        self.ranks.reduce_after(self.loss, last=last)
        _weighed(output.loss, share).backward()
        return output


def _weighed(loss: Tensor, share: float) -> Tensor:
    return loss if share == 1.0 else share * loss

"""TRQAM: Trust Region Q-Adjoint Matching (Algorithm 2).

The update up to the gradient is :class:`~vla_trqam.methods.adjoint_matching.TRQAMLoss`;
:class:`TRQAM` takes the step, measures the KL and moves lambda.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from vla_trqam.adjoint import AdjointKind
from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.adjoint_matching import (
    Part,
    TRQAMLoss,
    UpdateNoise,
    micro_batches,
    sampled_fields,
)
from vla_trqam.methods.average import WeightAverage
from vla_trqam.methods.base import (
    MethodConfig,
    OffPolicyMethod,
    Rehearsal,
    Requirements,
    Scalars,
)
from vla_trqam.methods.finite import Terms, check_finite, measured
from vla_trqam.methods.parallel import Ranks, clipped, whole, whole_moments
from vla_trqam.methods.results import (
    CriticLossOutput,
    CriticUpdateResult,
    LossOutput,
    UpdateResult,
)
from vla_trqam.policy import FlowPolicy
from vla_trqam.time_grid import (
    AdjointTime,
    FinalStep,
    Posterior,
    Scheme,
    ShiftedEuler,
    TimeGrid,
)
from vla_trqam.trust_region import TrustRegion, TrustRegionConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "TRQAM",
    "CriticLossOutput",
    "CriticUpdateResult",
    "LossOutput",
    "TRQAMConfig",
    "TRQAMLoss",
    "UpdateNoise",
    "UpdateResult",
]


SchemeName = Literal["posterior", "shifted_euler"]
FORMER_SCHEME: SchemeName = "shifted_euler"
"""What there was before there was a choice: of settings and checkpoints that name none."""

CHOICES = {
    "scheme": SchemeName,
    "adjoint": AdjointKind,
    "final_step": FinalStep,
    "adjoint_time": AdjointTime,
}
SCHEME = "scheme"
"""What a trust region's state belongs to."""
SCHEME_KNOBS = {
    "posterior": ("last_step_weight",),
    "shifted_euler": ("time_shift", "final_step", "adjoint_time"),
}


@dataclass(frozen=True)
class TRQAMConfig(TrustRegionConfig, MethodConfig):
    """Knobs of TRQAM beside the trust region's.

    Attributes:
        scheme: the chain that training samples: "posterior", or the authors' "shifted_euler"; why,
            and how their KLs compare, says docs/method.md.
        adjoint: "lean", through the base's Jacobians, or "scalar", without them: cheaper, and exact
            where the base's velocity does not depend on the action.
        last_step_weight: posterior only: how firmly the loss holds the tuned field to the base's in
            the last flow step, which has no noise; in units of the step before.
        time_shift: shifted_euler only: by what part of a step, in (0, 1], its times are shifted.
        final_step: shifted_euler only: how the last flow step is sampled, by the base and without
            noise, or like any other.
        adjoint_time: shifted_euler only: whose time the base's Jacobian at a state is taken at, the
            next step's or its own.
        keep_activations: keep those of every flow step until its gradients are taken, or compute
            them again, a step at a time: the same numbers in 1/K of the memory.
        actor_lr: Adam's step size for the tuned field (and a training base).
        critic_lr: Adam's step size for the critic.
        max_grad_norm: global-norm clip.
        shared_optimizer: one clip over actor, base and critic together, as the authors' code does;
            otherwise each has its own, and a diverging loss does not shrink the others' gradients.
        train_base: the base keeps training on the batch's flow-matching loss and ``v_base`` is its
            EMA, as in the authors' code; otherwise it is frozen.
        base_ema_rate: rate of that EMA.
        average_rate: what acts, is evaluated and saved is the running mean of the tuned weights
            with this rate an update; 0 for the weights themselves.
    """

    scheme: SchemeName = "posterior"
    adjoint: AdjointKind = "lean"
    last_step_weight: float = 1.0
    time_shift: float = 1.0
    final_step: FinalStep = "noiseless_base"
    adjoint_time: AdjointTime = "next"
    keep_activations: bool = True
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    max_grad_norm: float = 1.0
    shared_optimizer: bool = False
    train_base: bool = False
    base_ema_rate: float = 0.005
    average_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actor_lr", "critic_lr", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("actor_lr", "critic_lr"):
            if getattr(self, name) == math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite")
        if not 0.0 <= self.base_ema_rate <= 1.0:
            raise UserError(f"base_ema_rate is {self.base_ema_rate}; it must be in [0, 1]")
        if not 0.0 <= self.average_rate < 1.0:
            raise UserError(f"average_rate is {self.average_rate}; it must be in [0, 1)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = " or ".join(map(repr, get_args(choices)))
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {known}")
        self._refuse_idle_knobs()
        self.chain  # noqa: B018 (checks the scheme's own knobs)

    def _refuse_idle_knobs(self) -> None:
        defaults = {field.name: field.default for field in fields(TRQAMConfig)}
        for scheme, names in SCHEME_KNOBS.items():
            changed = [name for name in names if getattr(self, name) != defaults[name]]
            if changed and self.scheme != scheme:
                raise UserError(
                    f"{changed[0]} is {getattr(self, changed[0])!r}, but it belongs to the "
                    f"{scheme} scheme and scheme is {self.scheme!r}; set scheme to {scheme!r}, or "
                    "leave it out"
                )

    @property
    def chain(self) -> Scheme:
        """How the memoryless SDE is discretised."""
        if self.scheme == "posterior":
            return Posterior(self.last_step_weight)
        return ShiftedEuler(self.time_shift, self.adjoint_time, self.final_step)

    def check_flow_steps(self, count: int) -> None:
        """See :meth:`MethodConfig.check_flow_steps`."""
        try:
            TimeGrid(count, self.chain).steps  # noqa: B018 (refuses a grid that is too coarse)
        except UserError:
            raise UserError(
                f"is too few for the {self.scheme} scheme, whose last step has no noise: take at "
                "least 2 by --policy.tuned_flow_steps, or --method.scheme=shifted_euler"
            ) from None

    @property
    def trains_the_base(self) -> bool:
        """See :meth:`MethodConfig.trains_the_base`."""
        return self.train_base

    @property
    def keeps_average(self) -> bool:
        """See :meth:`MethodConfig.keeps_average`."""
        return self.average_rate > 0.0

    def rehearse(self, policy: FlowPolicy, context: Any, rows: int) -> Rehearsal:
        """The tuned field along a path of the chain."""
        values = sampled_fields(policy, context, rows, self).tuned()
        return Rehearsal(values, 1 if self.keep_activations else policy.num_flow_steps)

    @property
    def adjoint_scale(self) -> float:
        """Factor of the terminal adjoint: 1, for TRQAM moves lambda instead."""
        return 1.0


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

    requirements = Requirements(trains_field=True, next_actions=True, host_acts=True, adjoint=True)

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
        self.loss = TRQAMLoss(policy, critic, config)
        self._distribute()
        self.trust_region = TrustRegion(config, policy.chunk_shape[0])
        actor = [*policy.trainable_parameters(), *policy.behaviour_parameters()]
        critics = list(critic.online.parameters())
        self._clip_groups = [actor + critics] if config.shared_optimizer else [actor, critics]
        self.optimizer = torch.optim.Adam(
            [{"params": actor, "lr": config.actor_lr}, {"params": critics, "lr": config.critic_lr}],
            fused=True,
        )
        self._step_factor = 1.0
        rate = config.average_rate
        self.average = WeightAverage(policy.trainable_parameters(), rate) if rate else None
        self._result: UpdateResult | None = None
        self._critic_result: CriticUpdateResult | None = None

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
        if self.config.train_base:
            raise UserError("train_base: a base in training cannot be sharded; set one to false")
        if self.config.average_rate:
            raise UserError("average_rate: an average cannot be sharded; set it to 0")
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
        return nullcontext() if self.average is None else self.average.in_place()

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One update of critic, tuned field, lambda and targets; see :meth:`Method.update`."""
        noise = UpdateNoise.draw(batch.action, self.policy.num_flow_steps, generator)
        self._result = self.update_in_parts(micro_batches(batch, noise, num_parts))
        outputs = self._result.outputs
        self.next_action = torch.cat([output.next_action for output in outputs])

    def update_critic(
        self,
        batch: TransitionBatch[Any],
        generator: torch.Generator,
        next_action: Tensor | None = None,
    ) -> None:
        """Policy and lambda stand still; see :meth:`OffPolicyMethod.update_critic`."""
        noise = UpdateNoise.draw(batch.action, 0, generator)
        self._critic_result = self.update_critic_with(batch, noise, next_action)

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
        """Policy and critic, and the policy's average where that acts."""
        average = {} if self.average is None else {"average": self.average}
        return {"policy": self.policy, "critic": self.critic, **average}

    def scalars(self) -> Scalars:
        """The trust region's state, and the scheme in whose units it is."""
        state = self.trust_region.state_dict()
        return state | super().scalars() | {SCHEME: self.config.scheme}

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`.

        Raises:
            UserError: they are of another scheme, whose KL is in other units.
        """
        state = {name: float(values[name]) for name in self.trust_region.state_dict()}
        theirs, own = values.get(SCHEME, FORMER_SCHEME), self.config.scheme
        if theirs != own:
            raise UserError(
                f"lambda and its KL are of the {theirs} scheme and this run is of {own}, which has "
                f"other units: --method.scheme={theirs} goes on with them"
            )
        self.trust_region.load_state_dict(state)
        super().load_scalars(values)

    @property
    def kl_unit(self) -> str:
        """Nats of the chain, per action or per chunk."""
        return "nats per action" if self.config.kl_per_action else "nats per chunk"

    def update_critic_with(
        self, batch: TransitionBatch, noise: UpdateNoise, next_action: Tensor | None = None
    ) -> CriticUpdateResult:
        """:meth:`update_critic` with given noise.

        Args:
            batch: of chunks; this rank's.
            noise: of the update.
            next_action: see :meth:`TRQAMLoss.critic_loss`.

        Raises:
            DivergenceError: on every rank, before anything has moved.
        """
        (share,) = self.ranks.shares([len(batch)])
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.autocast():
            output = self.loss.critic_loss(batch, noise, next_action)
        self.ranks.reduce_after(self.loss, last=True)
        _weighed(output.loss, share).backward()
        parameters = list(self.critic.online.parameters())
        self.ranks.average_gradients(parameters)
        norm = clipped(parameters, self.config.max_grad_norm)
        self._checked({"the loss": ([output.loss], [share])}, [norm])
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
        self.ranks.average_gradients(p for group in self._clip_groups for p in group)
        norms = [clipped(group, self.config.max_grad_norm) for group in self._clip_groups]
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
        return UpdateResult(outputs, shares, lam, kl, norms, self.policy.executed, self.ranks)

    def _checked(self, sums: Mapping[str, Terms], norms: Sequence[Tensor]) -> dict[str, float]:
        """The numbers of an update, all finite, before anything has moved."""
        names = ["the actor's gradient norm", "the critic's gradient norm"][-len(norms) :]
        terms = {name: ([norm], [1.0]) for name, norm in zip(names, norms, strict=True)}
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

"""Every knob of TRQAM, which the other methods of adjoint matching build on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from vla_trqam.adjoint import AdjointKind
from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig, Rehearsal
from vla_trqam.methods.parts.adjoint_matching import sampled_fields
from vla_trqam.policy import FlowPolicy
from vla_trqam.time_grid import (
    AdjointTime,
    FinalStep,
    Posterior,
    Scheme,
    ShiftedEuler,
    TimeGrid,
)
from vla_trqam.trust_region import TrustRegionConfig

SchemeName = Literal["posterior", "shifted_euler"]
FORMER_SCHEME: SchemeName = "shifted_euler"
"""What there was before there was a choice: of settings and checkpoints that name none."""

CHOICES = {
    "scheme": SchemeName,
    "adjoint": AdjointKind,
    "final_step": FinalStep,
    "adjoint_time": AdjointTime,
}
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
        loss_steps: m, the flow steps of the K that the loss takes, drawn anew in each update and
            weighed K/m: the same gradient on average, through fewer evaluations; null for all.
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
        clone_interventions: weight of a flow-matching loss of the tuned field on the actions that a
            person took in place of the policy, which columns of the data tell; 0 for none.
        average_rate: what acts, is evaluated and saved is the running mean of the tuned weights
            with this rate an update; 0 for the weights themselves.
    """

    scheme: SchemeName = "posterior"
    adjoint: AdjointKind = "lean"
    loss_steps: int | None = None
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
    clone_interventions: float = 0.0
    average_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        if self.loss_steps is not None and self.loss_steps < 1:
            raise UserError(f"loss_steps is {self.loss_steps}; it must be at least 1, or null")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = " or ".join(map(repr, get_args(choices)))
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {known}")
        self._refuse_idle_knobs()
        self.chain  # noqa: B018 (checks the scheme's own knobs)

    def _check_numbers(self) -> None:
        for name in ("actor_lr", "critic_lr", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("actor_lr", "critic_lr"):
            if getattr(self, name) == math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite")
        if not 0.0 <= self.base_ema_rate <= 1.0:
            raise UserError(f"base_ema_rate is {self.base_ema_rate}; it must be in [0, 1]")
        if not 0.0 <= self.clone_interventions < math.inf:
            raise UserError(
                f"clone_interventions is {self.clone_interventions}; it must be finite and not "
                "negative"
            )
        if not 0.0 <= self.average_rate < 1.0:
            raise UserError(f"average_rate is {self.average_rate}; it must be in [0, 1)")

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
                "least 2 by --policy.tuned_flow_steps"
            ) from None
        if count == 1 and self.adjoint == "scalar" and not self.chain.pairs_with_next:
            raise UserError(
                f"is too few for the scalar adjoint of the {self.scheme} scheme, which is 0 at the "
                "first step: take at least 2 by --policy.tuned_flow_steps, or --method.adjoint=lean"
            )
        if self.loss_steps is not None and self.loss_steps > count:
            raise UserError(
                f"is fewer than the {self.loss_steps} flow steps of --method.loss_steps, which "
                "takes some of them: give less there, or null for all"
            )

    def check_shard(self) -> None:
        """See :meth:`MethodConfig.check_shard`."""
        if self.train_base:
            raise UserError("train_base: a base in training cannot be sharded; set one to false")
        if self.loss_steps is not None:
            raise UserError("loss_steps: ranks that draw other steps cannot shard; set it to null")
        if self.average_rate:
            raise UserError("average_rate: an average cannot be sharded; set it to 0")

    @property
    def trains_the_base(self) -> bool:
        """See :meth:`MethodConfig.trains_the_base`."""
        return self.train_base

    @property
    def reads_interventions(self) -> bool:
        """See :meth:`MethodConfig.reads_interventions`."""
        return self.clone_interventions > 0.0

    @property
    def keeps_average(self) -> bool:
        """See :meth:`MethodConfig.keeps_average`."""
        return self.average_rate > 0.0

    def rehearse(self, policy: FlowPolicy, context: Any, rows: int) -> Rehearsal:
        """The tuned field along a path of the chain, and where a person's actions are cloned."""
        parts = 1 if self.keep_activations else policy.num_flow_steps
        values = sampled_fields(policy, context, rows, self).tuned()
        if self.clone_interventions:
            # Kept whole, beside the whole path or beside each part of it.
            x, tau = torch.randn_like(values[0]), torch.rand_like(values[0, :, 0, 0])
            cloned = [policy.velocity(x, tau, context) for _ in range(parts)]
            values = torch.cat([values, torch.stack(cloned).to(values.dtype)])
        return Rehearsal(values, parts)

    @property
    def adjoint_scale(self) -> float:
        """Factor of the terminal adjoint: 1, for TRQAM moves lambda instead."""
        return 1.0

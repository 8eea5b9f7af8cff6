"""Behaviour cloning: flow matching on demonstrations."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vla_trqam.critic import ema_update
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_loss, flow_matching_target
from vla_trqam.methods.base import Method, Requirements, Scalars
from vla_trqam.methods.parts.adjoint_matching import UpdateNoise
from vla_trqam.methods.parts.finite import check_finite, measured
from vla_trqam.methods.parts.parallel import Ranks
from vla_trqam.policy import FlowPolicy


@dataclass(frozen=True)
class BehaviourCloningConfig:
    """Flow-matching pretraining.

    Attributes:
        lr: Adam's step size; it falls linearly to zero over the phase.
        ema_rate: the pretrained policy is the average of the weights with this rate.
    """

    lr: float = 1e-3
    ema_rate: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}; it must be positive and finite")
        if not 0.0 < self.ema_rate <= 1.0:
            raise UserError(f"ema_rate is {self.ema_rate}; it must be in (0, 1]")


class BehaviourCloning(Method):
    """Trains the tuned field on demonstrations; :meth:`finish` makes its average the policy."""

    requirements = Requirements(trains_field=True, next_actions=False, host_acts=True)

    def __init__(self, policy: FlowPolicy, config: BehaviourCloningConfig, num_steps: int) -> None:
        self.policy, self.config, self._num_steps = policy, config, num_steps
        self._average = copy.deepcopy(policy)
        self._done = 0
        self._loss = torch.zeros(())
        self.step_factor = 1.0
        self.optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=config.lr, fused=True)

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One step on the flow-matching loss."""
        assert num_parts == 1, "cloning takes its batch whole"
        noise = UpdateNoise.draw(batch.action, 0, generator)
        x_tau, target = flow_matching_target(batch.action, noise.bc_x_0, noise.bc_tau)
        context = self.policy.encode(batch.observation)
        velocity = self.policy.velocity(x_tau, noise.bc_tau, context)
        loss = flow_matching_loss(velocity, target, batch.valid)
        for group in self.optimizer.param_groups:
            left = 1.0 - self._done / self._num_steps
            group["lr"] = self.step_factor * self.config.lr * left
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self.policy.trainable_parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        sums = {
            "the behaviour-cloning loss": ([loss], [1.0]),
            "the norm of its gradient": (norms, [1.0] * len(norms)),
        }
        check_finite(measured(Ranks(), sums))
        self.optimizer.step()
        self._done += 1
        # A young average forgets its random start: the mean of all weights so far is at most 1/n.
        rate = max(self.config.ema_rate, 1.0 / self._done)
        ema_update(self._average.trainable_parameters(), self.policy.trainable_parameters(), rate)
        self._loss = loss.detach()

    def finish(self) -> None:
        """The average becomes the policy."""
        ema_update(self.policy.trainable_parameters(), self._average.trainable_parameters(), 1.0)

    def metrics(self) -> dict[str, float]:
        """The loss."""
        return {"bc_loss": float(self._loss)}

    def modules(self) -> Mapping[str, nn.Module]:
        """Policy and average."""
        return {"policy": self.policy, "average": self._average}

    def scalars(self) -> Scalars:
        """Steps done."""
        return {"done": self._done} | super().scalars()

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`."""
        self._done = int(values["done"])
        super().load_scalars(values)

"""What a training phase moves: behaviour cloning and the off-policy method, with state to save."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from vla_trqam.critic import ema_update
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_loss, flow_matching_target
from vla_trqam.methods.bc import BehaviourCloningConfig
from vla_trqam.methods.finite import check_finite, measured
from vla_trqam.methods.parallel import Ranks, shard_like
from vla_trqam.methods.trqam import (
    FORMER_SCHEME,
    TRQAM,
    CriticUpdateResult,
    UpdateNoise,
    UpdateResult,
)
from vla_trqam.policy import FlowPolicy

STEP_FACTOR = "step_factor"
SCHEME = "scheme"
"""What a trust region's state belongs to."""
Scalars = dict[str, float | str]
"""Numbers by name, and names of what they belong to."""


class Learner(Protocol):
    """One update at a time, and everything that moves as named tensors and numbers."""

    step_factor: float
    """What its step sizes are multiplied by; 1 unless the run rolled back."""

    def update(self, batch: TransitionBatch, generator: torch.Generator) -> None:
        """Takes one gradient step.

        Raises:
            DivergenceError: before the weights have moved.
        """

    def metrics(self) -> dict[str, float]:
        """The last update's logged quantities."""

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that act and are saved; no update is made there."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Networks to save, by name."""

    @property
    def own_modules(self) -> frozenset[str]:
        """Names of those that each process of a run has for itself."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser to save."""

    def scalars(self) -> Scalars:
        """Numbers to save."""

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`.

        Raises:
            UserError: they belong to something else.
        """


class BehaviourCloning:
    """Trains the tuned field on demonstrations; :meth:`finish` makes its average the policy."""

    own_modules: frozenset[str] = frozenset()

    def __init__(self, policy: FlowPolicy, config: BehaviourCloningConfig, num_steps: int) -> None:
        self.policy, self.config, self._num_steps = policy, config, num_steps
        self._average = copy.deepcopy(policy)
        self._done = 0
        self._loss = torch.zeros(())
        self.step_factor = 1.0
        self._optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=config.lr, fused=True)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the tuned field."""
        return self._optimizer

    def update(self, batch: TransitionBatch, generator: torch.Generator) -> None:
        """One step on the flow-matching loss."""
        noise = UpdateNoise.draw(batch.action, 0, generator)
        x_tau, target = flow_matching_target(batch.action, noise.bc_x_0, noise.bc_tau)
        context = self.policy.encode(batch.observation)
        velocity = self.policy.velocity(x_tau, noise.bc_tau, context)
        loss = flow_matching_loss(velocity, target, batch.valid)
        for group in self._optimizer.param_groups:
            left = 1.0 - self._done / self._num_steps
            group["lr"] = self.step_factor * self.config.lr * left
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self.policy.trainable_parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        sums = {
            "the behaviour-cloning loss": ([loss], [1.0]),
            "the norm of its gradient": (norms, [1.0] * len(norms)),
        }
        check_finite(measured(Ranks(), sums))
        self._optimizer.step()
        self._done += 1
        # A young average forgets its random start: the mean of all weights so far is at most 1/n.
        rate = max(self.config.ema_rate, 1.0 / self._done)
        ema_update(self._average.trainable_parameters(), self.policy.trainable_parameters(), rate)
        self._loss = loss.detach()

    def finish(self) -> None:
        """The average becomes the policy."""
        ema_update(self.policy.trainable_parameters(), self._average.trainable_parameters(), 1.0)

    def acting(self) -> AbstractContextManager[None]:
        """The weights as they are."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """The loss."""
        return {"bc_loss": float(self._loss)}

    def modules(self) -> Mapping[str, nn.Module]:
        """Policy and average."""
        return {"policy": self.policy, "average": self._average}

    def scalars(self) -> Scalars:
        """Steps done."""
        return {"done": self._done} | _factor_of(self)

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`."""
        self._done = int(values["done"])
        self.step_factor = float(values.get(STEP_FACTOR, 1.0))


class OffPolicy:
    """TRQAM or QAM as a learner."""

    own_modules: frozenset[str] = frozenset()

    def __init__(self, method: TRQAM) -> None:
        self.method = method
        self._result: UpdateResult | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The method's."""
        return self.method.optimizer

    @property
    def step_factor(self) -> float:
        """The method's."""
        return self.method.step_factor

    @step_factor.setter
    def step_factor(self, factor: float) -> None:
        self.method.step_factor = factor

    def update(self, batch: TransitionBatch, generator: torch.Generator) -> None:
        """One update of the method."""
        noise = UpdateNoise.draw(batch.action, self.method.policy.num_flow_steps, generator)
        self._result = self.method.update(batch, noise)

    def metrics(self) -> dict[str, float]:
        """The update's own and the trust region's."""
        assert self._result is not None, "metrics() before the first update()"
        config, region = self.method.config, self.method.trust_region
        values = self._result.metrics() | {"kl_ema": region.kl_ema}
        if config.dual_step_size > 0.0:
            values |= {
                "kl_budget": config.kl_budget,
                "lam_min": config.lam_min,
                "lam_max": config.lam_max,
            }
        return values

    def acting(self) -> AbstractContextManager[None]:
        """The method's."""
        return self.method.acting()

    def modules(self) -> Mapping[str, nn.Module]:
        """Policy and critic, and the policy's average where that acts."""
        return {
            "policy": self.method.policy,
            "critic": self.method.critic,
            **average_of(self.method),
        }

    def scalars(self) -> Scalars:
        """The trust region's state, and the scheme in whose units it is."""
        state = self.method.trust_region.state_dict()
        return state | _factor_of(self) | {SCHEME: self.method.config.scheme}

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`.

        Raises:
            UserError: they are of another scheme, whose KL is in other units.
        """
        state = {name: float(values[name]) for name in self.method.trust_region.state_dict()}
        theirs, own = values.get(SCHEME, FORMER_SCHEME), self.method.config.scheme
        if theirs != own:
            raise UserError(
                f"lambda and its KL are of the {theirs} scheme and this run is of {own}, which has "
                f"other units: --trqam.scheme={theirs} goes on with them"
            )
        self.method.trust_region.load_state_dict(state)
        self.step_factor = float(values.get(STEP_FACTOR, 1.0))


class CriticWarmup(OffPolicy):
    """The critic of an :class:`OffPolicy` learner by itself, before its policy moves."""

    def __init__(self, learner: OffPolicy) -> None:
        super().__init__(learner.method)
        self._critic_result: CriticUpdateResult | None = None

    def update(self, batch: TransitionBatch, generator: torch.Generator) -> None:
        """One update of the critic."""
        noise = UpdateNoise.draw(batch.action, 0, generator)
        self._critic_result = self.method.update_critic(batch, noise)

    def metrics(self) -> dict[str, float]:
        """The update's own."""
        assert self._critic_result is not None, "metrics() before the first update()"
        return self._critic_result.metrics()


def average_of(method: TRQAM) -> dict[str, nn.Module]:
    """As a module to save, where there is one."""
    return {} if method.average is None else {"average": method.average}


def _factor_of(learner: Learner) -> Scalars:
    """As a number to save, of a run that rolled back."""
    return {} if learner.step_factor == 1.0 else {STEP_FACTOR: learner.step_factor}


def module_tensors(learner: Learner, *, own: bool = False) -> dict[str, Tensor]:
    """Every weight of a learner under ``<module>.<key>``.

    Args:
        learner: whose.
        own: only of what this process has for itself.
    """
    return {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in learner.modules().items()
        if not own or name in learner.own_modules
        for key, value in module.state_dict().items()
    }


def load_module_tensors(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Restores :func:`module_tensors`.

    Raises:
        UserError: a key belongs to no module.
        RuntimeError: a module lacks a key, or has it in another shape.
    """
    modules = learner.modules()
    strange = sorted(key for key in tensors if key.partition(".")[0] not in modules)
    if strange:
        raise UserError(f"{strange[0]} is a weight of none of {', '.join(modules)}")
    for name, module in modules.items():
        prefix = f"{name}."
        mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        own = module.state_dict()
        parts = {k: shard_like(own[k], v) if k in own else v for k, v in mine.items()}
        module.load_state_dict(parts, strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts under ``<parameter number>.<name>``."""
    return {
        f"{number}.{key}": value.detach().contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores :func:`optimizer_tensors`.

    Raises:
        UserError: there is no such parameter, or it has another shape.
    """
    parameters = list(_parameters(optimizer))
    optimizer.state.clear()  # a parameter that had not moved yet has none
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        if int(number) >= len(parameters):
            raise UserError(f"{name} is the state of none of the {len(parameters)} parameters")
        parameter = parameters[int(number)]
        if value.dim() and value.shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
            )
        # Adam keeps its step counts where its moments are when fused.
        own = value.to(parameter.device)
        optimizer.state[parameter][key] = shard_like(parameter, own) if value.dim() else own


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])

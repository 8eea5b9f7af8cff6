"""What most off-policy methods share: one Adam, one critic with its target, one sum of losses.

A method built on :class:`SummedLosses` says which networks it has, what an update draws and what
its losses are; the step, micro-batches, several processes and the checks are here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_loss, flow_matching_target, td_loss, td_target
from vla_trqam.methods.base import MethodConfig, Noise, OffPolicyMethod
from vla_trqam.methods.parts.finite import Terms, check_finite, measured
from vla_trqam.methods.parts.parallel import Ranks, clipped
from vla_trqam.policy import Context, FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

if TYPE_CHECKING:
    from accelerate import Accelerator

Field = Callable[[Tensor, Tensor, Context], Tensor]
"""``v(x, tau, context)``: (B, H, A), (B,) -> (B, H, A)."""
Draws = Mapping[str, Tensor]
"""Every random number of an update by name, (B, ...) each."""


@dataclass(frozen=True)
class OffPolicyConfig(MethodConfig):
    """Knobs that every off-policy method has.

    Attributes:
        actor_lr: Adam's step size for what acts (and a training base).
        critic_lr: Adam's step size for the critic and other values.
        max_grad_norm: global-norm clip of all gradients together; null for none.
        train_base: the base keeps training on the batch's flow-matching loss, as in the authors'
            code; otherwise it is frozen.
        base_ema_rate: rate of a training base's EMA.
    """

    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    max_grad_norm: float | None = None
    train_base: bool = False
    base_ema_rate: float = 0.005

    def __post_init__(self) -> None:
        for name in ("actor_lr", "critic_lr"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}; it must be positive, or null")
        if not 0.0 <= self.base_ema_rate <= 1.0:
            raise UserError(f"base_ema_rate is {self.base_ema_rate}; it must be in [0, 1]")

    @property
    def trains_the_base(self) -> bool:
        """See :meth:`MethodConfig.trains_the_base`."""
        return self.train_base


@dataclass(frozen=True)
class Losses:
    """What one forward pass found.

    Attributes:
        loss: the sum to differentiate, a scalar.
        logged: means over the batch, scalars.
        next_action: see :attr:`OffPolicyMethod.next_action`.
    """

    loss: Tensor
    logged: Mapping[str, Tensor]
    next_action: Tensor | None = None


@dataclass(frozen=True)
class _Found:
    """An update's losses and gradient norm, and the shares of its micro-batches."""

    outputs: Sequence[Losses]
    shares: Sequence[float]
    norms: Mapping[str, Tensor]
    ranks: Ranks

    def metrics(self) -> dict[str, float]:
        parts = [{k: float(v) for k, v in output.logged.items()} for output in self.outputs]
        return self.ranks.mean_of(parts, self.shares) | {
            name: float(norm) for name, norm in self.norms.items()
        }


class SummedLosses(OffPolicyMethod):
    """One sum of losses, one gradient, one Adam over all networks.

    Args:
        policy: the policy as it came.
        critic: the critic ensemble.
        config: the knobs.
        accelerator: of ``accelerate``, with several processes or bfloat16.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        critic: Critic,
        config: OffPolicyConfig,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        self.ranks = Ranks(accelerator)
        if config.train_base:
            policy.start_base_training()
        self.own = nn.ModuleDict(
            {k: v.to(next(critic.parameters()).device) for k, v in self.make_networks().items()}
        )
        for module in (policy, critic, self.own):
            self.ranks.synchronize(module)
        values = nn.ModuleList([critic.online, *(self.own[n] for n in self.values())])
        valued = set(values.parameters())
        actors = [*policy.behaviour_parameters()]
        actors += [p for p in self.own.parameters() if p not in valued]
        self._groups = {"actor_grad_norm": actors, "critic_grad_norm": list(values.parameters())}
        groups = [
            {"params": group, "lr": lr}
            for group, lr in zip(
                self._groups.values(), (config.actor_lr, config.critic_lr), strict=True
            )
            if group
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._step_factor = 1.0
        self._found: _Found | None = None
        self._critic_found: _Found | None = None

    config: Any
    """The knobs, of the method's own kind."""

    @abstractmethod
    def make_networks(self) -> dict[str, nn.Module]:
        """The method's networks beside policy and critic, by the name they are saved under."""

    @abstractmethod
    def values(self) -> tuple[str, ...]:
        """Names of those that learn values, with the critic's step size."""

    @abstractmethod
    def draw(self, batch: TransitionBatch[Any], generator: torch.Generator) -> Draws:
        """Every random number of an update."""

    @abstractmethod
    def losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """The update up to the gradient."""

    @abstractmethod
    def critic_losses(self, batch: TransitionBatch[Any], draws: Draws) -> Losses:
        """What of it trains the critic (and what it needs) alone."""

    @property
    def step_factor(self) -> float:
        """What the config's step sizes are multiplied by."""
        return self._step_factor

    @step_factor.setter
    def step_factor(self, factor: float) -> None:
        self._step_factor = factor
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate

    def modules(self) -> Mapping[str, nn.Module]:
        """Policy, critic and the method's own."""
        return {"policy": self.policy, "critic": self.critic, **dict(self.own.items())}

    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """One update of everything; see :meth:`Method.update`."""
        self.update_from(batch, self.draw(batch, generator), num_parts=num_parts)

    def update_from(self, batch: TransitionBatch[Any], draws: Draws, *, num_parts: int = 1) -> None:
        """:meth:`update` with given random numbers."""
        parts = [
            (rows_of(batch, rows), {name: value[rows] for name, value in draws.items()})
            for rows in slices(len(batch), num_parts)
        ]
        self._found = self._step(parts, lambda part: self.losses(*part), moves_base=True)
        self.next_action = joined([output.next_action for output in self._found.outputs])

    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """See :meth:`OffPolicyMethod.update_critic`."""
        draws = self.draw(batch, generator)
        self._critic_found = self._step(
            [(batch, draws)],
            lambda part: self.critic_losses(*part),
            moves_base=False,
        )

    def metrics(self) -> dict[str, float]:
        """The update's losses and gradient norms."""
        assert self._found is not None, "metrics() before the first update()"
        return self._found.metrics()

    def critic_metrics(self) -> dict[str, float]:
        """The critic's."""
        assert self._critic_found is not None, "critic_metrics() before the first update_critic()"
        found = self._critic_found.metrics()
        found.pop("actor_grad_norm")
        return found

    def _step(
        self,
        parts: Sequence[tuple[TransitionBatch[Any], Draws]],
        forward: Callable[[tuple[TransitionBatch[Any], Draws]], Losses],
        *,
        moves_base: bool,
    ) -> _Found:
        shares = self.ranks.shares([len(batch) for batch, _ in parts])
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for part, share in zip(parts, shares, strict=True):
            with self.ranks.autocast():
                output = forward(part)
            (output.loss if share == 1.0 else share * output.loss).backward()
            outputs.append(output)
        everything = [p for group in self._groups.values() for p in group]
        self.ranks.average_gradients(everything)
        norms = {
            name: nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for name, group in self._groups.items()
        }
        if self.config.max_grad_norm is not None:
            clipped(everything, self.config.max_grad_norm)
        self._check(outputs, shares, norms)
        # The targets follow the weights as they were before this step, as in the authors' code.
        self.critic.update_target()
        if moves_base:
            self.policy.update_base(self.config.base_ema_rate)
        # Adam leaves alone what has no gradient.
        self.optimizer.step()
        return _Found(outputs, shares, norms, self.ranks)

    def _check(
        self, outputs: Sequence[Losses], shares: Sequence[float], norms: Mapping[str, Tensor]
    ) -> None:
        """All numbers of an update are finite, before anything has moved."""
        sums: dict[str, Terms] = {"the loss": ([o.loss for o in outputs], shares)}
        sums |= {f"the {name.replace('_', ' ')}": ([n], [1.0]) for name, n in norms.items()}
        check_finite(measured(self.ranks, sums))

    def temporal_difference(
        self, batch: TransitionBatch[Any], features: Tensor, next_value: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The TD loss of the online critic, and what is logged of it.

        Args:
            batch: of chunks.
            features: of the observations, (B, F).
            next_value: of the next observations, (B,).
        """
        target = td_target(batch.chunk_return, batch.discount, batch.terminated, next_value)
        # What was executed is within the limits.
        q = self.critic.online(features, self.policy.executed(batch.action, clip=False))
        loss = td_loss(q, target, td_weight(batch, self.policy.executed_length))
        return loss, critic_terms(loss.detach(), q.detach(), target)

    @property
    def cloned_field(self) -> Field:
        """The field of a training base as it is, not its EMA; of a frozen one, the base's."""
        if self.config.train_base:
            return self.policy.behaviour_velocity
        return self.policy.base_velocity

    def behaviour_cloning(
        self, batch: TransitionBatch[Any], draws: Draws, context: Any
    ) -> Tensor | None:
        """The flow-matching loss of a training base; None where it is frozen."""
        if not self.config.train_base:
            return None
        x_tau, velocity = flow_matching_target(batch.action, draws["bc_x_0"], draws["bc_tau"])
        predicted = self.policy.behaviour_velocity(x_tau, draws["bc_tau"], context)
        return flow_matching_loss(predicted, velocity, batch.valid)


@dataclass(frozen=True)
class FieldActor:
    """Euler's method on a given field.

    Attributes:
        policy: whose chunks and number of flow steps.
        field: ``v(x, tau, context)``.
    """

    policy: FlowPolicy
    field: Field

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`."""
        x_0, grid = noise.normal(self.policy.chunk_shape), TimeGrid(self.policy.num_flow_steps)
        return sample_ode(lambda x, tau: self.field(x, tau, context), x_0, grid)


def draw_cloning(action: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise and times of the flow-matching loss of chunks (B, H, A)."""
    x_0 = torch.empty_like(action).normal_(generator=generator)
    tau = action.new_empty(len(action)).uniform_(generator=generator)
    return {"bc_x_0": x_0, "bc_tau": tau}


def td_weight(batch: TransitionBatch[Any], executed: int) -> Tensor:
    """1 where all n = ``executed`` actions were taken, or a termination left none to take: (B,)."""
    return (batch.valid[:, executed - 1] | batch.terminated).to(batch.chunk_return.dtype)


def critic_terms(td: Tensor, q: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What is logged of a critic: its loss and means, of q (E, B) and of the target (B,)."""
    return {
        "td_loss": td,
        "q_mean": q.mean(),
        "q_std": q.std(dim=0, correction=0).mean(),
        "target_mean": target.mean(),
    }


def joined(chunks: Sequence[Tensor | None]) -> Tensor | None:
    """Those of all micro-batches in order; None where they are not known."""
    known = [chunk for chunk in chunks if chunk is not None]
    return torch.cat(known) if len(known) == len(chunks) else None


def slices(rows: int, count: int) -> list[slice]:
    """``count`` parts of so many rows.

    Raises:
        UserError: there are fewer rows than parts.
    """
    if not 1 <= count <= rows:
        raise UserError(f"a batch of {rows} rows cannot be split in {count} micro-batches")
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def rows_of(batch: TransitionBatch[Any], rows: slice) -> TransitionBatch[Any]:
    """These rows of a batch."""
    values = {field.name: _rows(getattr(batch, field.name), rows) for field in fields(batch)}
    return TransitionBatch(**values)


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {key: _rows(entry, rows) for key, entry in value.items()}
    return None if value is None else value[rows]

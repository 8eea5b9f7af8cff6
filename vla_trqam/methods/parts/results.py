"""What a loss and an update found, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vla_trqam.critic import Executed
from vla_trqam.methods.parts.parallel import Ranks
from vla_trqam.sde import Trajectory


@dataclass(frozen=True)
class LossOutput:
    """What one forward pass of the loss found; everything but ``loss`` is detached.

    Attributes:
        loss: TD + adjoint matching (+ flow matching of a training base, a method's own terms).
        td_loss, adjoint_loss, bc_loss: its parts.
        kl_per_step: each flow step's share of the path KL, nats per chunk, (K,).
        last_gap: ``v_tuned - v_base`` in the last step, (B, H, A), which no KL of the posterior
            chain counts.
        q: online Q values of the batch, (E, B).
        target: TD targets, (B,).
        trajectory: the chain's path.
        adjoint: for every step the adjoint paired with it, (K, B, H, A).
        terminal_adjoint: ``a_K``, (B, H, A).
        next_action: what is executed at the next observation, (B, n, a); None if not wanted.
        more: what the method logs of its own, scalars by name.
    """

    loss: Tensor
    td_loss: Tensor
    adjoint_loss: Tensor
    bc_loss: Tensor | None
    kl_per_step: Tensor
    last_gap: Tensor
    q: Tensor
    target: Tensor
    trajectory: Trajectory
    adjoint: Tensor
    terminal_adjoint: Tensor
    next_action: Tensor | None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def metrics(self, executed: Executed) -> dict[str, float]:
        """The means over the batch; each is explained in ``docs/metrics.md``.

        Args:
            executed: see :meth:`FlowPolicy.executed`.
        """
        x_1 = self.trajectory.x_1
        terminal = self.terminal_adjoint.flatten(1).norm(dim=1).mean()
        values = {
            "adjoint_loss": float(self.adjoint_loss),
            "adjoint_norm_terminal": float(terminal),
            "adjoint_norm_initial": float(self.adjoint[0].flatten(1).norm(dim=1).mean()),
            "last_step_offset": float(
                self.last_gap.flatten(1).norm(dim=1).mean() * self.trajectory.grid.step_size
            ),
            **_critic_metrics(self.td_loss, self.q, self.target),
            "clipped_action_fraction": float(
                (executed(x_1) != executed(x_1, clip=False)).float().mean()
            ),
        }
        if self.bc_loss is not None:
            values["bc_loss"] = float(self.bc_loss)
        return values | {name: float(value) for name, value in self.more.items()}


@dataclass(frozen=True)
class CriticLossOutput:
    """What one forward pass of the critic's loss found.

    Attributes:
        loss: the TD loss (+ a method's own terms), a scalar.
        td_loss: the first of these, detached.
        q: online Q values of the batch, (E, B), detached.
        target: TD targets, (B,).
        more: what the method logs of its own, scalars by name.
    """

    loss: Tensor
    td_loss: Tensor
    q: Tensor
    target: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The means over the batch; each is explained in ``docs/metrics.md``."""
        more = {name: float(value) for name, value in self.more.items()}
        return _critic_metrics(self.td_loss, self.q, self.target) | more


def _critic_metrics(td: Tensor, q: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "td_loss": float(td),
        "q_mean": float(q.mean()),
        "q_std": float(q.std(dim=0, correction=0).mean()),
        "target_mean": float(target.mean()),
    }


@dataclass(frozen=True)
class UpdateResult:
    """One update's outcome.

    Attributes:
        outputs: the loss and its parts, of every micro-batch of this process.
        shares: see :meth:`Ranks.shares`.
        lam: the lambda that the loss used.
        kl_estimate: the path KL of the batch before the step, in the budget's unit.
        grad_norms: norms before clipping: actor, critic - or one of both together.
        executed: see :meth:`FlowPolicy.executed`.
        ranks: the processes of the update.
    """

    outputs: Sequence[LossOutput]
    shares: Sequence[float]
    lam: float
    kl_estimate: float
    grad_norms: Sequence[Tensor]
    executed: Executed
    ranks: Ranks

    @property
    def output(self) -> LossOutput:
        """The loss and its parts, of an update that had one micro-batch."""
        (output,) = self.outputs
        return output

    def metrics(self) -> dict[str, float]:
        """The logged quantities of the whole batch; each is explained in ``docs/metrics.md``.

        Every process of the run must ask: the means are over all of them.
        """
        parts = [output.metrics(self.executed) for output in self.outputs]
        return {
            "kl_estimate": self.kl_estimate,
            "lam": self.lam,
            **self.ranks.mean_of(parts, self.shares),
            "actor_grad_norm": float(self.grad_norms[0]),
            "critic_grad_norm": float(self.grad_norms[-1]),
        }


@dataclass(frozen=True)
class CriticUpdateResult:
    """Outcome of an update of the critic alone.

    Attributes:
        output: the loss on this process's batch.
        share: see :meth:`Ranks.shares`.
        grad_norm: the gradient's norm before clipping.
        ranks: the processes of the update.
    """

    output: CriticLossOutput
    share: float
    grad_norm: Tensor
    ranks: Ranks

    def metrics(self) -> dict[str, float]:
        """As :meth:`UpdateResult.metrics`."""
        means = self.ranks.mean_of([self.output.metrics()], [self.share])
        return means | {"critic_grad_norm": float(self.grad_norm)}

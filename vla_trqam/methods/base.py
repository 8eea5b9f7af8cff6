"""What a method is to the rest of the house: what it trains, how it acts, what is kept of it.

The engine, evaluations, checkpoints and reports know :class:`Method`, :class:`OffPolicyMethod` and
:class:`Actor`, and no method by name. A method is one file and one line of the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from vla_trqam.critic import Critic
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.policy import Context, FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

STEP_FACTOR = "step_factor"
Scalars = dict[str, float | str]
"""Numbers by name, and names of what they belong to."""
Which = Literal["tuned", "base"]


class Noise(Protocol):
    """Standard normal numbers for a batch of B observations, which can be repeated."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape), other numbers at every call."""


class GeneratorNoise:
    """Noise of a whole batch from one generator.

    Args:
        generator: whose numbers.
        rows: B.
        device: where they are made.
    """

    def __init__(self, generator: torch.Generator, rows: int, device: torch.device) -> None:
        self._generator, self._rows, self._device = generator, rows, device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape)."""
        drawn = torch.empty((self._rows, *shape), device=self._device)
        return drawn.normal_(generator=self._generator)


class Actor(Protocol):
    """The one way to act: rollouts, evaluations, TD targets and cached next actions ask it."""

    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """One chunk for every observation, in the flow's space: (B, H, A), without gradient.

        Args:
            context: of the observations, by the policy's ``encode``.
            noise: what is random of it.
        """


@dataclass(frozen=True)
class FlowActor:
    """Euler's method on a policy's own field, from noise to action: what a flow policy does.

    Attributes:
        policy: whose field.
        which: the tuned field or the base's.
        num_flow_steps: K; None for the policy's.
    """

    policy: FlowPolicy
    which: Which = "tuned"
    num_flow_steps: int | None = None

    @torch.no_grad()
    def chunk(self, context: Context, noise: Noise) -> Tensor:
        """See :meth:`Actor.chunk`."""
        policy = self.policy
        grid = TimeGrid(self.num_flow_steps or policy.num_flow_steps)
        x_0 = noise.normal(policy.chunk_shape)
        if self.which == "tuned":
            return sample_ode(policy.sampled_field(context), x_0, grid)
        return sample_ode(lambda x, tau: policy.base_velocity(x, tau, context), x_0, grid)


@dataclass(frozen=True)
class Rehearsal:
    """A pass through a policy as an update makes it, to be measured.

    Attributes:
        values: what it computed, with the graph to the trained weights.
        parts: an update keeps the activations of one of so many equal parts at a time.
    """

    values: Tensor
    parts: int


class MethodConfig:
    """A method's knobs: a frozen dataclass, whose fields are the flags ``--method.<name>``."""

    def check_flow_steps(self, count: int) -> None:
        """Refuses a number of flow steps that the method cannot be trained with.

        Raises:
            UserError: why not; the number's name is for the caller to say.
        """

    @property
    def lent_critics(self) -> Mapping[str, Path]:
        """Checkpoints' folders whose critics it uses as they are, by the knob that names each."""
        return {}

    def check_inputs(self) -> None:
        """Reads what the knobs name, before anything else is opened.

        Raises:
            UserError: a file or folder is missing, or is not what it should be.
        """

    @property
    def trains_the_base(self) -> bool:
        """Whether the base is to go on training by behaviour cloning."""
        return False

    @property
    def reads_interventions(self) -> bool:
        """Whether a column must tell which of the replay's actions a person took."""
        return False

    @property
    def keeps_average(self) -> bool:
        """Whether a running mean of the policy's trained weights is kept beside them."""
        return False

    @property
    def notice(self) -> str:
        """What a reader of the terminal should know of the method before it trains."""
        return ""

    def check_shard(self) -> None:
        """Refuses knobs with which the method's weights cannot be kept in parts.

        Raises:
            UserError: why not.
        """

    def rehearse(self, policy: FlowPolicy, context: Context, rows: int) -> Rehearsal | None:
        """The pass of an update through the policy's trained weights; None where there is none.

        Args:
            policy: the policy.
            context: of ``rows`` observations.
            rows: B.
        """
        return None


@dataclass(frozen=True)
class Requirements:
    """What a method asks of a policy and of a run.

    Attributes:
        trains_field: the policy's own weights move; otherwise the policy stays as it came and only
            networks beside it are trained.
        next_actions: the TD target needs an action of the policy at the next observation.
        host_acts: the saved policy acts by itself in its host library; otherwise what acts needs
            the method's own networks too.
        paths: an update evaluates both fields along a path of the memoryless chain.
        adjoint: an adjoint starts from the action gradient of the critic's target.
        learns_critic: a critic is learnt of the replay's rewards.
        soft_values: what it learns holds more than rewards, like an entropy, and so has no bounds
            that the rewards tell.
        own_field: what acts is a velocity field of the method's own, in which nothing of the
            pretrained one is used.
        can_shard: of several processes, each can keep a part of what is trained.
        idle: further flags of the critic that have no effect.
    """

    trains_field: bool
    next_actions: bool
    host_acts: bool
    paths: bool = False
    adjoint: bool = False
    learns_critic: bool = True
    soft_values: bool = False
    own_field: bool = False
    can_shard: bool = False
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Offers:
    """What every policy that a recipe takes can do, known before one is loaded.

    Attributes:
        training_base: its base can go on training.
        own_field: a small field of a method's own may act in its place.
        interventions: its data can have columns that tell of interventions.
    """

    training_base: bool
    own_field: bool = False
    interventions: bool = False


class Method(ABC):
    """One update at a time, how to act, and everything that moves as named tensors and numbers."""

    requirements: ClassVar[Requirements]
    own_modules: frozenset[str] = frozenset()
    """Names of the modules that each process of a run has for itself."""

    policy: FlowPolicy
    optimizer: torch.optim.Optimizer
    step_factor: float
    """What its step sizes are multiplied by; 1 unless the run rolled back."""

    @abstractmethod
    def update(
        self, batch: TransitionBatch[Any], generator: torch.Generator, *, num_parts: int = 1
    ) -> None:
        """Takes one gradient step.

        Args:
            batch: of chunks; this process's.
            generator: of the noise.
            num_parts: micro-batches that it is taken in, one after the other: less memory.

        Raises:
            DivergenceError: before the weights have moved.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The last update's logged quantities; each is explained in ``docs/metrics.md``.

        Every process of the run must ask: the means are over all of them.
        """

    @abstractmethod
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks to save, by name."""

    def actor(self, which: Which = "tuned") -> Actor:
        """What acts: the policy in training, or its base."""
        return FlowActor(self.policy, which)

    def first_actor(self) -> Actor:
        """Whose next actions a critic values that is learnt before the policy's first update."""
        return self.actor()

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that act and are saved; no update is made there."""
        return nullcontext()

    def present(self, wanted: bool = True) -> AbstractContextManager[None]:
        """Inside, weights of which each process has a part are all there, to be read.

        Every process enters. No update is made there.

        Args:
            wanted: by this process; where none wants them, none gets them.
        """
        return nullcontext()

    def scalars(self) -> Scalars:
        """Numbers to save."""
        return {} if self.step_factor == 1.0 else {STEP_FACTOR: self.step_factor}

    def load_scalars(self, values: Mapping[str, float | str]) -> None:
        """Restores :meth:`scalars`.

        Raises:
            UserError: they belong to something else.
        """
        self.step_factor = float(values.get(STEP_FACTOR, 1.0))


class OffPolicyMethod(Method):
    """A method that learns from replayed transitions, with a critic over chunks."""

    critic: Critic
    next_action: Tensor | None = None
    """What would be executed at the last update's next observations, (B, n, a); None if unknown."""

    @abstractmethod
    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """One update of the critic alone; how the policy acts stays as it is.

        Args:
            batch: of chunks; this process's.
            generator: of the noise.

        Raises:
            DivergenceError: on every process, before anything has moved.
        """

    @abstractmethod
    def critic_metrics(self) -> dict[str, float]:
        """The last :meth:`update_critic`'s logged quantities."""

    def score(self, features: Tensor, action: Tensor) -> Tensor:
        """The value of executed chunks: features (B, F), action (B, n, a) -> (B,)."""
        with torch.no_grad():
            return self.critic.online(features, action).mean(dim=0)

    @property
    def kl_unit(self) -> str:
        """Of the logged ``kl_estimate``; empty where there is none."""
        return ""

"""A run's two numbers of flow steps: the base's own, and the one that is trained and acted with."""

from __future__ import annotations

from dataclasses import dataclass

from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig
from vla_trqam.policy import FlowPolicy


@dataclass(frozen=True)
class FlowSteps:
    """How many flow steps, K, a run's policies take.

    Attributes:
        own: of the base as it came.
        tuned: of training and the tuned policy, and of the base that it is compared with.
    """

    own: int
    tuned: int

    @classmethod
    def of(cls, tuned: FlowPolicy, base: FlowPolicy | None = None) -> FlowSteps:
        """Of a policy in training, whose base may be a policy of its own."""
        return cls((base or tuned).own_flow_steps, tuned.num_flow_steps)

    @property
    def differ(self) -> bool:
        """Whether the base as it came is another policy than the base that tuning began with."""
        return self.own != self.tuned

    @property
    def change(self) -> str:
        """What became of the number, "fewer steps" or "more steps"."""
        return "fewer steps" if self.tuned < self.own else "more steps"


def check_flow_steps(count: int, what: str, config: MethodConfig) -> None:
    """Refuses a number of flow steps that a method cannot be trained with.

    Raises:
        UserError: it is too small.
    """
    try:
        config.check_flow_steps(count)
    except UserError as error:
        raise UserError(f"{what} {error}") from None


def check_own_steps(own: int, count: int | None, config: MethodConfig) -> None:
    """The same of a given policy's own number, as its config says it, where the settings have none.

    Raises:
        UserError: it is too small.
    """
    if count is None:
        check_flow_steps(own, f"the policy's own number of flow steps, {own},", config)

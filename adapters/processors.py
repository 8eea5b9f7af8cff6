"""The host's processors, kept with the policy: normalisation, tokens, devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import ACTION
from torch import Tensor

from vla_trqam.errors import UserError

Statistics = dict[str, dict[str, Tensor]]
"""By feature (``observation.state``), then by name (``mean``)."""

Limits = tuple[Tensor | Sequence[float] | float, Tensor | Sequence[float] | float]
"""Lowest and highest action, in the robot's units: one number, or one of a dimension."""


@dataclass(frozen=True)
class Processors:
    """A policy's pre- and postprocessor.

    Attributes:
        before: raw observations (and actions) to what the policy takes.
        after: the policy's actions to the robot's.
    """

    before: Any
    after: Any

    def observe(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Raw batch to the policy's batch; actions in it are normalised too."""
        if "task" not in batch:
            raise UserError(f"the observation has no 'task' (an instruction); it has {[*batch]}")
        return self.before(dict(batch))

    def normalize_action(self, action: Tensor) -> Tensor:
        """The robot's actions to the policy's, (..., a) both."""
        step, transition = self.normalizer, create_transition(action=action)
        return step(transition)[TransitionKey.ACTION]

    def normalized_limits(self, real: int, limits: Limits | None) -> Tensor:
        """Lowest and highest action in the policy's space, (2, a).

        Args:
            real: a, the robot's action dimensions.
            limits: in the robot's units; None takes the statistics' ``min`` and ``max``.

        Raises:
            UserError: the limits have another shape, or a lowest is not below its highest.
        """
        if limits is None:
            known = self.statistics.get(ACTION, {})
            if not {"min", "max"} <= known.keys():
                return torch.tensor([[-torch.inf], [torch.inf]]).expand(2, real)
            limits = known["min"], known["max"]
        try:
            both = [torch.as_tensor(v, dtype=torch.float32).expand(real) for v in limits]
        except RuntimeError:
            raise UserError(f"the action limits {limits} do not have {real} dimensions") from None
        low, high = self.normalize_action(torch.stack(both)).cpu()
        if not bool((low < high).all()):
            raise UserError(f"action limits: {both[0].tolist()} is not below {both[1].tolist()}")
        return torch.stack([low, high])

    def to_robot(self, action: Tensor) -> Tensor:
        """Normalised actions of the real dimensions, (..., a), to the robot's."""
        return self.after(action)

    def save_pretrained(self, directory: Path) -> None:
        """In LeRobot's format, beside the policy."""
        self.before.save_pretrained(directory)
        self.after.save_pretrained(directory)

    @property
    def normalizer(self) -> NormalizerProcessorStep:
        """The step of :attr:`before` that holds the statistics."""
        return _only_step(self.before, NormalizerProcessorStep)

    @property
    def statistics(self) -> Statistics:
        """What observations and actions are normalised by."""
        return _statistics(self.normalizer)

    @property
    def action_statistics(self) -> Statistics:
        """What actions are put back by."""
        return _statistics(_only_step(self.after, UnnormalizerProcessorStep))


def _only_step(pipeline: Any, kind: type) -> Any:
    steps = [step for step in pipeline.steps if isinstance(step, kind)]
    if len(steps) != 1:
        raise UserError(
            f"the processor {pipeline.name!r} has {len(steps)} steps of type {kind.__name__}; "
            "exactly one is needed"
        )
    return steps[0]


def _statistics(step: Any) -> Statistics:
    nested: Statistics = {}
    for key, value in step.state_dict().items():
        feature, _, name = key.rpartition(".")
        nested.setdefault(feature, {})[name] = value
    return nested

"""The host's processors, kept with the policy: normalisation, tokens, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import (
    NormalizerProcessorStep,
    TokenizerProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import ACTION
from torch import Tensor

from vla_trqam.errors import UserError

Statistics = dict[str, dict[str, Tensor]]
"""By feature (``observation.state``), then by name (``mean``)."""

Limits = tuple[Tensor | Sequence[float] | float, Tensor | Sequence[float] | float]
"""Lowest and highest action, in the robot's units: one number, or one of a dimension."""

NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""The statistics that each normalisation takes."""


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

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """One feature, the robot's units to the policy's, (..., d) both."""
        if key == ACTION:
            return self.normalizer(create_transition(action=value))[TransitionKey.ACTION]
        done = self.normalizer(create_transition(observation={key: value}))
        return done[TransitionKey.OBSERVATION][key]

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
        low, high = self.normalize(ACTION, torch.stack(both)).cpu()
        if not bool((low < high).all()):
            raise UserError(f"action limits: {both[0].tolist()} is not below {both[1].tolist()}")
        return torch.stack([low, high])

    def to_robot(self, action: Tensor) -> Tensor:
        """Normalised actions of the real dimensions, (..., a), to the robot's."""
        return self.after(action)

    def pad_instructions(self) -> None:
        """Pads every instruction to its full length, so that observations can be kept row by row.

        SmolVLA's preprocessor pads to the longest of a batch; what the policy does is the same.
        """
        for step in self.before.steps:
            if isinstance(step, TokenizerProcessorStep):
                step.padding = "max_length"

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

    def statistics_problems(self) -> Iterator[str]:
        """A sentence for each statistic that is needed and missing, or not finite.

        LeRobot leaves a feature without statistics as it is, and says nothing.
        """
        step = self.normalizer
        for key, feature in step.features.items():
            mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
            if mode is NormalizationMode.IDENTITY:
                continue
            yield from _entry_problems("preprocessor", key, mode, self.statistics.get(key, {}))
            if feature.type is FeatureType.ACTION:
                after = self.action_statistics.get(key, {})
                yield from _entry_problems("postprocessor", key, mode, after)
                yield from _disagreements(key, mode, self.statistics.get(key, {}), after)

    @property
    def action_statistics(self) -> Statistics:
        """What actions are put back by."""
        return _statistics(_only_step(self.after, UnnormalizerProcessorStep))


def _entry_problems(
    where: str, key: str, mode: NormalizationMode, entry: Mapping[str, Tensor]
) -> Iterator[str]:
    missing = [name for name in NEEDED[mode] if name not in entry]
    if missing:
        yield (
            f"the {where} has no {' and no '.join(missing)} of {key}, which its normalisation "
            f"{mode.value} needs"
        )
    for name in NEEDED[mode]:
        if name in entry and not bool(torch.isfinite(entry[name]).all()):
            yield f"the {where} has a {name} of {key} that is not finite"


def _disagreements(
    key: str, mode: NormalizationMode, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[str]:
    """Actions must be put back by the numbers that they are normalised by."""
    for name in NEEDED[mode]:
        there, back = before.get(name), after.get(name)
        if there is None or back is None or there.shape != back.shape:
            continue
        if name == "std" and bool((there < 0).any()):
            yield f"the preprocessor has a negative std of {key}"
        if bool((there.isfinite() & back.isfinite() & (there != back)).any()):
            yield f"the {name} of {key} in the postprocessor is not that in the preprocessor"


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

"""The host's processors, kept with the policy: normalisation, tokens, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    NormalizerProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import ACTION, OBS_STATE
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

FLAT = 1e-6
"""A dimension whose statistics span less did not move in the policy's training data.

LeRobot divides by 1e-8 there, or by 1e-8 more than the standard deviation: every number but the
one that it stood at becomes a huge one.
"""


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of what a policy is told.

    Attributes:
        lengths: of each prompt.
        limit: tokens that the policy takes; LeRobot's tokenizer cuts what is beyond.
    """

    lengths: list[int]
    limit: int


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

        A dimension that never moved in training has none: the policy cannot move it either.

        Args:
            real: a, the robot's action dimensions.
            limits: in the robot's units; None takes the statistics' ``min`` and ``max``.

        Raises:
            UserError: the limits have another shape, or a lowest is not below its highest.
        """
        given = limits is not None
        if limits is None:
            known = self.statistics.get(ACTION, {})
            if not {"min", "max"} <= known.keys():
                return torch.tensor([[-torch.inf], [torch.inf]]).expand(2, real)
            limits = known["min"], known["max"]
        try:
            both = [torch.as_tensor(v, dtype=torch.float32).expand(real) for v in limits]
        except RuntimeError:
            raise UserError(f"the action limits {limits} do not have {real} dimensions") from None
        found = self.normalize(ACTION, torch.stack(both)).cpu()
        unlimited = torch.tensor([[-torch.inf], [torch.inf]])
        found[:, self.flat(ACTION).nonzero().flatten()] = unlimited
        if not given:
            found[:, (both[1] - both[0]).abs() < FLAT] = unlimited
        if not bool((found[0] < found[1]).all()):
            raise UserError(f"action limits: {both[0].tolist()} is not below {both[1].tolist()}")
        return found

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

    def prompt_lengths(self, tasks: Sequence[str], states: Tensor) -> PromptLengths | None:
        """How many tokens the policy is told, without a cut; None where no tokenizer reads it.

        Args:
            tasks: N instructions.
            states: (N, d) in the robot's units; π0.5 is told them in words.
        """
        transition = create_transition(
            observation={OBS_STATE: states}, complementary_data={"task": list(tasks)}
        )
        for step in self.before.steps:
            if isinstance(step, TokenizerProcessorStep):
                texts = step.get_task(transition)
                tokens = step.input_tokenizer(texts, truncation=False)["input_ids"]
                return PromptLengths([len(each) for each in tokens], step.max_length)
            transition = step(transition)
        return None

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

    def mode(self, key: str) -> NormalizationMode:
        """How a feature is normalised."""
        step = self.normalizer
        feature = step.features.get(key)
        same = NormalizationMode.IDENTITY
        return same if feature is None else step.norm_map.get(feature.type, same)

    def flat(self, key: str) -> Tensor:
        """(d,) bool: dimensions of a feature that never moved, by what normalises it; else (0,).

        They are normalised as LeRobot does it, and nothing can be judged by them.
        """
        mode, entry = self.mode(key), self.statistics.get(key, {})
        names = NEEDED.get(mode, ())
        if not names or not entry:
            return torch.zeros(0, dtype=torch.bool)
        low, high = (entry[name].flatten() for name in names)
        return (high if mode is NormalizationMode.MEAN_STD else high - low).abs() < FLAT

    def flat_names(self) -> list[str]:
        """``action[2]`` and the like, for every dimension of state and action that is flat."""
        return [
            f"{key}[{dim}]"
            for key in (OBS_STATE, ACTION)
            for dim in self.flat(key).nonzero().flatten().tolist()
        ]

    def width(self, key: str) -> int | None:
        """How many numbers of a feature the statistics know; None where they know none of it."""
        return _width(self.statistics.get(key, {}))

    @property
    def action_width(self) -> int | None:
        """The same of an action, in what puts it back."""
        return _width(self.action_statistics.get(ACTION, {}))

    def correct_width(self, key: str) -> None:
        """Lets the steps say of a feature what their statistics say."""
        width = self.width(key)
        assert width is not None
        for step in (self.normalizer, self.unnormalizer):
            if key in step.features:
                step.features[key] = replace(step.features[key], shape=(width,))

    def statistics_problems(self) -> Iterator[str]:
        """A sentence for each statistic that is needed and missing, not finite, or of odd length.

        LeRobot leaves a feature without statistics as it is, and says nothing.
        """
        step = self.normalizer
        for key, feature in step.features.items():
            mode = self.mode(key)
            if mode is NormalizationMode.IDENTITY:
                continue
            yield from _entry_problems("preprocessor", key, mode, self.statistics.get(key, {}))
            if feature.type is FeatureType.ACTION:
                after = self.action_statistics.get(key, {})
                yield from _entry_problems("postprocessor", key, mode, after)
                yield from _disagreements(key, mode, self.statistics.get(key, {}), after)

    @property
    def unnormalizer(self) -> UnnormalizerProcessorStep:
        """The step of :attr:`after` that puts actions back."""
        return _only_step(self.after, UnnormalizerProcessorStep)

    @property
    def action_statistics(self) -> Statistics:
        """What actions are put back by."""
        return _statistics(self.unnormalizer)

    @property
    def relative(self) -> bool:
        """Whether a step makes actions relative to the state, or absolute again."""
        kinds = RelativeActionsProcessorStep, AbsoluteActionsProcessorStep
        steps = (*self.before.steps, *self.after.steps)
        return any(step.enabled for step in steps if isinstance(step, kinds))


def _width(entry: Mapping[str, Tensor]) -> int | None:
    known = [entry[name].numel() for names in NEEDED.values() for name in names if name in entry]
    return known[0] if known else None


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
    lengths = [entry[name].numel() for name in NEEDED[mode] if name in entry]
    if len(set(lengths)) > 1:
        found = " and ".join(map(str, lengths))
        yield f"the {where} has {' and '.join(NEEDED[mode])} of {key} with {found} numbers"


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

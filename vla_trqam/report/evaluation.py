"""Paired evaluation: did the tuned policy become better than its base, and how sure is that?

Both policies face the same fixed initial states (one seed each), so the comparison is paired: what
counts are the states that one policy solves and the other does not. Where training took another
number of flow steps than the base's own, the base acts with that number too, for a gain of tuning
is one against it; the base as it came is a third policy (:class:`BaseAsItCame`).

Rates carry Wilson intervals, their difference the square-and-add interval for paired proportions
(method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial
proportions based on paired data", Statistics in Medicine 17, 2635-2650) and McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_trqam.data.episode import Episode
from vla_trqam.errors import UserError
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.intervals import (
    Interval,
    mcnemar_exact_p,
    paired_difference_interval,
    wilson_interval,
)

__all__ = [
    "BaseAsItCame",
    "Interval",
    "Outcome",
    "PairedEvaluation",
    "paired_difference_interval",
    "wilson_interval",
]


@dataclass(frozen=True)
class Outcome:
    """What counts of an episode.

    Attributes:
        seed: of its initial state, and of its task in a suite.
        success: whether the task was solved.
        num_steps: control steps until it ended.
        task: what the policy was told first; empty where that was not kept.
    """

    seed: int
    success: bool
    num_steps: int
    task: str = ""

    @classmethod
    def of(cls, episode: Episode) -> Outcome:
        """Of a whole rollout."""
        assert episode.seed is not None, "only what a simulator played can be repeated"
        task = episode.task if isinstance(episode.task, str) else episode.task[0]
        return cls(int(episode.seed), bool(episode.success), episode.num_steps, task)


RAW_FIELDS = ("seeds", "base_success", "tuned_success", "base_steps", "tuned_steps")
AS_IT_CAME = "base_as_it_came"
"""Its entry in ``evaluation.json``."""
TASKS = "tasks"


@dataclass(frozen=True, eq=False)
class BaseAsItCame:
    """Outcomes of the base with its own number of flow steps, where tuning took another.

    Attributes:
        success: (N,) bool, on the initial states of the paired evaluation, in their order.
        steps: (N,) int64, control steps until the episode ended.
        flow_steps: the two numbers.
    """

    success: NDArray[np.bool_]
    steps: NDArray[np.int64]
    flow_steps: FlowSteps

    def __post_init__(self) -> None:
        object.__setattr__(self, "success", _as_vector(self.success, np.bool_, "success"))
        object.__setattr__(self, "steps", _as_vector(self.steps, np.int64, "steps"))

    def to_json(self, seeds: NDArray[np.int64]) -> dict[str, Any]:
        """What `json.dump` takes: the raw outcomes, and beside them rate and interval."""
        interval = wilson_interval(int(self.success.sum()), len(seeds))
        return {
            "num_flow_steps": self.flow_steps.own,
            "num_flow_steps_of_base_and_tuned": self.flow_steps.tuned,
            "success": self.success.tolist(),
            "steps": self.steps.tolist(),
            "rate": float(self.success.mean()),
            "interval_95": _pair(interval),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BaseAsItCame:
        """Rebuild from `to_json`; rate and interval are computed again."""
        fields = ("success", "steps", "num_flow_steps", "num_flow_steps_of_base_and_tuned")
        missing = [name for name in fields if name not in data]
        if missing:
            raise ValueError(f"{AS_IT_CAME} lacks {missing}")
        success, steps, own, tuned = (data[name] for name in fields)
        return cls(success, steps, FlowSteps(int(own), int(tuned)))


@dataclass(frozen=True, eq=False)
class PairedEvaluation:
    """Outcomes of base and tuned policy on the same N initial states.

    Attributes:
        seeds: (N,) int64, the seed of each initial state; all different.
        base_success: (N,) bool.
        tuned_success: (N,) bool.
        base_steps: (N,) int64, control steps until the episode ended.
        tuned_steps: (N,) int64.
        as_it_came: the base with its own number of flow steps, where the other two take another.
        tasks: (N,) texts, the task of each initial state; () where they are not known.
    """

    seeds: NDArray[np.int64]
    base_success: NDArray[np.bool_]
    tuned_success: NDArray[np.bool_]
    base_steps: NDArray[np.int64]
    tuned_steps: NDArray[np.int64]
    as_it_came: BaseAsItCame | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in RAW_FIELDS:
            dtype = np.bool_ if name.endswith("success") else np.int64
            object.__setattr__(self, name, _as_vector(getattr(self, name), dtype, name))
        if len({len(getattr(self, name)) for name in RAW_FIELDS}) != 1 or len(self) == 0:
            sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in RAW_FIELDS)
            raise ValueError(f"a paired evaluation needs as many of each, at least one: {sizes}")
        if len(np.unique(self.seeds)) != len(self):
            raise ValueError("an initial state (seed) occurs twice: it would be counted twice")
        if len(self.tasks) not in (0, len(self)):
            raise ValueError(f"there are {len(self.tasks)} tasks of {len(self)} initial states")
        extra = self.as_it_came
        if extra is not None and not len(extra.success) == len(extra.steps) == len(self):
            sizes = f"success {len(extra.success)}, steps {len(extra.steps)}"
            raise ValueError(f"{AS_IT_CAME} needs an outcome of each of {len(self)} seeds: {sizes}")

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def base_rate(self) -> float:
        """Success rate of the base policy."""
        return float(self.base_success.mean())

    @property
    def tuned_rate(self) -> float:
        """Success rate of the tuned policy."""
        return float(self.tuned_success.mean())

    @property
    def difference(self) -> float:
        """Tuned minus base success rate."""
        return (len(self.gained) - len(self.lost)) / len(self)

    @property
    def gained(self) -> NDArray[np.int64]:
        """Seeds that only the tuned policy solves."""
        return self.seeds[self.tuned_success & ~self.base_success]

    @property
    def lost(self) -> NDArray[np.int64]:
        """Seeds that only the base policy solves."""
        return self.seeds[self.base_success & ~self.tuned_success]

    @property
    def kept(self) -> NDArray[np.int64]:
        """Seeds that both policies solve."""
        return self.seeds[self.base_success & self.tuned_success]

    @property
    def failed_both(self) -> NDArray[np.int64]:
        """Seeds that neither policy solves."""
        return self.seeds[~self.base_success & ~self.tuned_success]

    def by_task(self) -> dict[str, PairedEvaluation]:
        """Of each task's initial states alone, in the tasks' order; {} where there are not two."""
        several = sorted(set(self.tasks))
        if len(several) < 2:
            return {}
        tasks = np.array(self.tasks)
        return {task: self._among(tasks == task) for task in several}

    def _among(self, chosen: NDArray[np.bool_]) -> PairedEvaluation:
        """The tuned flow steps' base and the tuned policy on some of the initial states."""
        return PairedEvaluation(*(getattr(self, name)[chosen] for name in RAW_FIELDS))

    def by_steps_alone(self) -> PairedEvaluation | None:
        """The base as it came, and as "tuned" the base with the tuned number of flow steps."""
        return self._after_as_it_came(self.base_success, self.base_steps)

    def in_total(self) -> PairedEvaluation | None:
        """The base as it came, and the tuned policy."""
        return self._after_as_it_came(self.tuned_success, self.tuned_steps)

    def _after_as_it_came(
        self, success: NDArray[np.bool_], steps: NDArray[np.int64]
    ) -> PairedEvaluation | None:
        came = self.as_it_came
        if came is None:
            return None
        return PairedEvaluation(self.seeds, came.success, success, came.steps, steps)

    def base_interval(self, confidence: float = 0.95) -> Interval:
        """Wilson interval of the base policy's success rate."""
        return wilson_interval(int(self.base_success.sum()), len(self), confidence)

    def tuned_interval(self, confidence: float = 0.95) -> Interval:
        """Wilson interval of the tuned policy's success rate."""
        return wilson_interval(int(self.tuned_success.sum()), len(self), confidence)

    def difference_interval(self, confidence: float = 0.95) -> Interval:
        """Paired interval of `difference` (Newcombe 1998, method 10)."""
        return paired_difference_interval(
            both=len(self.kept),
            tuned_only=len(self.gained),
            base_only=len(self.lost),
            neither=len(self.failed_both),
            confidence=confidence,
        )

    def mcnemar_p(self) -> float:
        """McNemar's exact two-sided p-value."""
        return mcnemar_exact_p(len(self.gained), len(self.lost))

    def to_json(self) -> dict[str, Any]:
        """What `json.dump` takes: the raw outcomes, and beside them the statistics for a reader."""
        raw: dict[str, Any] = {name: getattr(self, name).tolist() for name in RAW_FIELDS}
        if len(set(self.tasks)) > 1:
            raw[TASKS] = list(self.tasks)
        if self.as_it_came is not None:
            raw[AS_IT_CAME] = self.as_it_came.to_json(self.seeds) | self._differences()
        return raw | {
            "base_rate": self.base_rate,
            "base_interval_95": _pair(self.base_interval()),
            "tuned_rate": self.tuned_rate,
            "tuned_interval_95": _pair(self.tuned_interval()),
            "difference": self.difference,
            "difference_interval_95": _pair(self.difference_interval()),
            "mcnemar_exact_p": self.mcnemar_p(),
            "gained": self.gained.tolist(),
            "lost": self.lost.tolist(),
        }

    def _differences(self) -> dict[str, Any]:
        """Of both effects, for a reader."""
        found = {}
        for name, pair in (
            ("by_steps_alone", self.by_steps_alone()),
            ("in_total", self.in_total()),
        ):
            assert pair is not None, "the base as it came was evaluated"
            found[name] = {
                "difference": pair.difference,
                "difference_interval_95": _pair(pair.difference_interval()),
            }
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PairedEvaluation:
        """Rebuild from `to_json`; only the raw outcomes are read, the rest is computed again.

        Raises:
            UserError: When a raw field is missing or not a list of the right kind and length.
        """
        missing = [name for name in RAW_FIELDS if name not in data]
        if missing:
            raise UserError(f"a paired evaluation lacks {missing}; it has {sorted(data)}")
        try:
            came = None if AS_IT_CAME not in data else BaseAsItCame.from_json(data[AS_IT_CAME])
            raw = {name: data[name] for name in RAW_FIELDS}
            return cls(**raw, as_it_came=came, tasks=tuple(map(str, data.get(TASKS, ()))))
        except (TypeError, ValueError) as error:
            raise UserError(f"not a paired evaluation: {error}") from error


def _as_vector(values: ArrayLike, dtype: type, name: str) -> NDArray[Any]:
    """`values` as a read-only vector of `dtype`; refuses values that the cast would change."""
    given = np.asarray(values)
    vector: NDArray[Any] = given.astype(dtype)
    if given.ndim != 1 or not np.array_equal(vector, given):
        raise ValueError(f"{name} must be a vector of {dtype.__name__}, not {given!r:.60}")
    vector.flags.writeable = False
    return vector


def _pair(interval: Interval) -> list[float]:
    return [interval.low, interval.high]

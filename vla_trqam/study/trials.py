"""How each method's knobs are found: as many trials for every method, on seeds of their own."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.errors import UserError, one_line
from vla_trqam.report.formats import percent
from vla_trqam.study.plan import Plan, ReadRun, Variant, make_plan, shared_settings
from vla_trqam.study.results import read_results
from vla_trqam.study.run import carried_out
from vla_trqam.study.settings import CompareConfig, StudyTask


@dataclass(frozen=True)
class Trial:
    """Knobs that were tried.

    Attributes:
        knobs: by name.
        rate: mean success at the end, over the trials' seeds; None where a run diverged.
        made: what else decided about it: recipe, settings, data, seeds.
    """

    knobs: Mapping[str, Any]
    rate: float | None
    made: Mapping[str, Any]

    def text(self) -> str:
        """For a table."""
        knobs = ", ".join(f"{name} {value}" for name, value in self.knobs.items())
        return f"{knobs}: {'failed' if self.rate is None else percent(self.rate)}"


@dataclass(frozen=True)
class Trials:
    """What was tried, by task and method.

    Attributes:
        found: in the table's order.
    """

    found: Mapping[tuple[str, str], Sequence[Trial]]

    def of(self, task: StudyTask, method: str) -> Sequence[Trial]:
        """Those by which a task's knobs are found; none where its table asks for none."""
        if task.tried_in == task.name and not task.trials.get(method):
            return ()  # known trials may be of a task of the same name in another table
        return self.found.get((task.tried_in, method), ())

    def chosen(self, task: StudyTask, method: str) -> Mapping[str, Any]:
        """The knobs of the best trial, of equal ones the first; none where nothing went well."""
        good = [trial for trial in self.of(task, method) if trial.rate is not None]
        best = max(good, key=lambda trial: trial.rate or 0.0, default=None)
        return {} if best is None else best.knobs

    def text(self, task: StudyTask, method: str) -> str:
        """For a table."""
        tried = self.of(task, method)
        if tried and task.tried_in != task.name:
            return f"in {task.tried_in}"
        return "; ".join(trial.text() for trial in tried) or "this value alone"

    def records(self) -> list[dict[str, Any]]:
        """One a trial, for :func:`known_trials`."""
        return [
            {"task": task, "method": method, **asdict(trial)}
            for (task, method), tried in self.found.items()
            for trial in tried
        ]

    def lacking(
        self, task: StudyTask, methods: Sequence[str], settings: CompareConfig, read: ReadRun
    ) -> list[str]:
        """Of which methods the trials that a task wants are not here, or were made otherwise.

        The settings are those of the trials.
        """
        missing = []
        for method in methods:
            made = _made(settings, task, method, read)
            wanted = [(dict(knobs), made) for knobs in task.trials.get(method, ())]
            known = self.found.get((task.name, method), ())
            whole = all(trial.rate is not None for trial in known)
            if not whole or wanted != [(dict(trial.knobs), trial.made) for trial in known]:
                missing.append(method)
        return missing

    def variants_in(self, task: StudyTask, methods: Sequence[str]) -> list[Variant]:
        """Each method as it is compared."""
        return [Variant(name, name, self.chosen(task, name)) for name in methods]


def known_trials(path: Path) -> Trials:
    """Those of an earlier study.

    Raises:
        UserError: the file is no summary of one.
    """
    found: dict[tuple[str, str], list[Trial]] = {}
    try:
        for record in json.loads(path.read_text())["trials"]:
            rate = None if record["rate"] is None else float(record["rate"])
            trial = Trial(dict(record["knobs"]), rate, dict(record["made"]))
            found.setdefault((record["task"], record["method"]), []).append(trial)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--known_trials={path} is no summary.json of a comparison with trials "
            f"({type(error).__name__}: {one_line(error)})"
        ) from None
    return Trials(found)


def made_trials(settings: CompareConfig, read: ReadRun) -> Trials | None:
    """Makes the trials that the tasks' table asks for; None where it was stopped before the end.

    Raises:
        UserError: one failed otherwise than by diverging, which would leave its method fewer than
            the others; or see :func:`make_plan` and :func:`carried_out`.
    """
    path = settings.known_trials
    known = Trials({}) if path is None else known_trials(path)
    own = replace(
        settings,
        # Not those that are compared, which would be refused twice.
        seeds=settings.trial_seeds,
        trial_seeds=settings.seeds,
        flags={**settings.flags, **settings.trial_flags},
    )
    to_make = {task.name: known.lacking(task, own.methods, own, read) for task in settings.tuned()}
    kept = {
        (task, method): tried
        for (task, method), tried in known.found.items()
        if method not in to_make.get(task, ())
    }
    tasks = tuple(name for name, methods in to_make.items() if methods)
    if not tasks:
        return Trials(kept)
    own = replace(own, tasks=tasks)
    plan = make_plan(own, lambda task: _variants(task, to_make[task.name]), read)
    failed = carried_out(own, plan)
    if failed is None:
        return None
    _check_failed(plan, failed)
    rates: dict[tuple[str, str], list[float]] = {}
    for result in read_results(plan.runs):
        rates.setdefault((result.task, result.label), []).append(result.final)

    def trial(task: StudyTask, variant: Variant) -> Trial:
        own_rates = rates.get((task.name, variant.label), [])
        whole = len(own_rates) == len(own.seeds)
        rate = float(np.mean(own_rates)) if whole else None
        return Trial(variant.knobs, rate, _made(own, task, variant.method, read))

    found: dict[tuple[str, str], list[Trial]] = {}
    for task in map(settings.task, tasks):
        for variant in _variants(task, to_make[task.name]):
            found.setdefault((task.name, variant.method), []).append(trial(task, variant))
    return Trials({**kept, **found})


def _made(settings: CompareConfig, task: StudyTask, method: str, read: ReadRun) -> dict[str, Any]:
    """What decides about a trial beside its knobs, as it is read from a file."""
    made = {
        "recipe": task.recipe,
        "settings": shared_settings(settings, task, method, read),
        "data": None if task.data is None else asdict(task.data),
        "seeds": settings.seeds,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(made))
    return as_read


def _check_failed(plan: Plan, failed: Collection[str]) -> None:
    lost = [
        step.name
        for step in plan.steps
        if step.name in failed and not (step.folder / DIVERGED_NAME).is_file()
    ]
    if lost:
        raise UserError(
            f"the trials {', '.join(lost)} failed, so their methods would have fewer than the "
            "others; the same command tries them again"
        )


def _variants(task: StudyTask, methods: Sequence[str]) -> list[Variant]:
    return [
        Variant(f"{method}_trial{number}", method, knobs)
        for method in methods
        for number, knobs in enumerate(task.trials.get(method, ()))
    ]

"""The settings of a study: a grid of runs, and what is the same in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vla_trqam.errors import UserError
from vla_trqam.methods.registry import METHODS

ENTRIES = ("recipe", "preset", "flags", "knobs", "trials", "data")
OF_DATA = ("recipe", "flags", "file")


@dataclass
class StudySettings:
    """What every study has.

    Attributes:
        output_dir: the study's folder; the same command goes on there.
        tasks: which of the table of tasks.
        seeds: of the training; each has a base of its own.
        workers: runs side by side; null for one a core.
        num_threads: torch's threads in each run.
        flags: settings of every run, by their names without dashes.
        table: the tasks by name: of each its recipe, preset and flags, each method's knobs and what
            is tried to find them, and how its data is made.
    """

    output_dir: Path | None = None
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int | None = None
    num_threads: int = 1
    flags: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)

    GRID: ClassVar[tuple[str, ...]] = ("tasks", "seeds")
    """Names of the settings that span the grid."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise UserError("--output_dir is missing: the folder of the study")
        for name in self.GRID:
            values: Sequence[Any] = getattr(self, name)
            if not values:
                raise UserError(f"--{name}=[] is empty; a study needs at least one")
            if len(set(values)) < len(values):
                raise UserError(f"--{name}=[{', '.join(map(str, values))}] has one twice")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers={self.workers} must be at least 1")
        if self.num_threads < 1:
            raise UserError(f"--num_threads={self.num_threads} must be at least 1")
        for name in self.tasks:
            if name not in self.table:
                known = ", ".join(self.table) or "none"
                raise UserError(f"--tasks: {name} is not in the study's table, which has {known}")

    def task(self, name: str) -> StudyTask:
        """A task of the table."""
        return StudyTask.read(name, self.table[name])


@dataclass
class CompareConfig(StudySettings):
    """Every setting of the comparison; ``--preset`` names a section of compare.yaml.

    Attributes:
        methods: by their names in the registry.
        trial_seeds: of the trials, by which each method's knobs are found in the tasks whose table
            has trials; none of the comparison's own.
        trial_flags: settings of the trials' runs; they win over the others.
        known_trials: the ``summary.json`` of an earlier study, perhaps on another machine, whose
            trials are not made again where they are of the same knobs and settings.
    """

    GRID: ClassVar[tuple[str, ...]] = ("methods", "tasks", "seeds", "trial_seeds")

    methods: tuple[str, ...] = ("trqam",)
    trial_seeds: tuple[int, ...] = (100,)
    trial_flags: dict[str, Any] = field(default_factory=dict)
    known_trials: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.methods:
            check_method(name, "--methods")
        for seed in self.trial_seeds:
            if seed in self.seeds:
                raise UserError(
                    f"--trial_seeds has {seed}, which --seeds has too: knobs are found on seeds "
                    "that are not compared"
                )
        for task in map(self.task, self.tasks):
            if task.tried_in != task.name:
                self._check_lender(task)
        for task in self.tuned():
            _check_equal_trials(task, self.methods)

    def tuned(self) -> list[StudyTask]:
        """The tasks whose trials these tasks' knobs are found by, each once."""
        names = dict.fromkeys(self.task(name).tried_in for name in self.tasks)
        return [task for task in map(self.task, names) if task.trials]

    def _check_lender(self, task: StudyTask) -> None:
        """The task whose trials serve another has some; it need not be compared itself."""
        lenders = [name for name in self.table if self.task(name).trials]
        if task.tried_in not in lenders:
            there = ", ".join(lenders) or "none"
            raise UserError(
                f"the trials of the task {task.name} are those of {task.tried_in}, which is no "
                f"task of the table with trials of its own; there are {there}"
            )


@dataclass
class SweepConfig(StudySettings):
    """Every setting of the sweep; ``--preset`` names a section of sweep_kl.yaml.

    Attributes:
        method: the one whose knob ``kl_budget`` is swept.
        budgets: the KL budgets, in the method's unit.
    """

    GRID: ClassVar[tuple[str, ...]] = ("budgets", "tasks", "seeds")

    method: str = "trqam"
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.method, "--method")
        for budget in self.budgets:
            if not 0.0 < budget < float("inf"):
                raise UserError(f"--budgets: {budget} must be positive and finite")


@dataclass(frozen=True)
class StudyData:
    """How a task's data is made.

    Attributes:
        recipe: the command, without its ``.py``.
        flags: of it, but for the output.
        file: the name of what it writes.
    """

    recipe: str
    flags: Mapping[str, Any]
    file: str


@dataclass(frozen=True)
class StudyTask:
    """A task as all methods meet it.

    Attributes:
        name: in the table.
        recipe: the command that makes its runs, without its ``.py``.
        preset: of the recipe.
        flags: the same for all methods.
        knobs: of the methods, by the method's name; they win over the preset's.
        trials: knobs that are tried before, the best of which a method takes, by its name.
        tried_in: the task whose trials these methods take their knobs from; its own name unless
            the entry's `trials` names another.
        data: how its data is made; None where the flags say where it is.
    """

    name: str
    recipe: str
    preset: str
    flags: Mapping[str, Any]
    knobs: Mapping[str, Mapping[str, Any]]
    trials: Mapping[str, Sequence[Mapping[str, Any]]]
    tried_in: str
    data: StudyData | None

    @classmethod
    def read(cls, name: str, entry: Any) -> StudyTask:
        """An entry of the table.

        Raises:
            UserError: it has a word that means nothing, or lacks one.
        """
        where = f"the task {name} of the study's table"
        values = _mapping(entry, where, ENTRIES)
        data = values.get("data")
        if "recipe" not in values:
            raise UserError(f"{where} has no recipe; give the command that makes its runs")
        own = {part: values.get(part) or {} for part in ("flags", "knobs", "trials")}
        tried_in = name
        if isinstance(own["trials"], str):
            tried_in, own["trials"] = own["trials"], {}
        for method in {*own["knobs"], *own["trials"]}:
            check_method(method, where)
        for method, trials in own["trials"].items():
            _check_trials(trials, f"the trials of {method} in {where}")
        return cls(
            name=name,
            recipe=str(values["recipe"]),
            preset=str(values.get("preset", "default")),
            tried_in=tried_in,
            data=None if data is None else _data(data, f"the data of {where}"),
            **own,
        )


def _check_trials(trials: Any, where: str) -> None:
    good = isinstance(trials, Sequence) and all(isinstance(t, Mapping) and t for t in trials)
    if not good or len(trials) < 2:
        raise UserError(
            f"{where} are {trials!r}; they must be a list of two or more mappings of knobs, like "
            "[{alpha: 100}, {alpha: 300}]"
        )
    if any(trial in trials[:number] for number, trial in enumerate(trials)):
        raise UserError(f"{where} have one twice")


def _check_equal_trials(task: StudyTask, methods: Sequence[str]) -> None:
    """None of the methods is tuned more than another."""
    counts = {name: len(task.trials.get(name, ())) for name in methods}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(
            f"the task {task.name} has unequal trials ({listed}); give every method as many, or "
            "none to any"
        )


def check_method(name: str, where: str) -> None:
    """Refuses a method that is not in the registry.

    Raises:
        UserError: with those that are.
    """
    if name not in METHODS:
        raise UserError(f"{where}: {name} is no method; there are {', '.join(METHODS)}")


def _data(entry: Any, where: str) -> StudyData:
    values = _mapping(entry, where, OF_DATA)
    missing = [word for word in ("recipe", "file") if word not in values]
    if missing:
        raise UserError(f"{where} has no {missing[0]}; it needs a recipe and the file it writes")
    return StudyData(str(values["recipe"]), values.get("flags") or {}, str(values["file"]))


def _mapping(entry: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is {entry!r}; it must be a mapping of {', '.join(known)}")
    strange = [word for word in entry if word not in known]
    if strange:
        raise UserError(f"{where} has {strange[0]!r}; what it can have is {', '.join(known)}")
    return entry

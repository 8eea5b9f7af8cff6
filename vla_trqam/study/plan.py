"""A study's steps: the data of each task, a base for each task and seed, and the runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_trqam.config.parsing import check_begun_with, chosen_settings
from vla_trqam.config.state_settings import StateRunConfig
from vla_trqam.engine.base_record import OUTCOMES, RECORD_NAME
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole
from vla_trqam.jobs.states import PRETRAIN
from vla_trqam.report.metrics import TRAINING_PHASES
from vla_trqam.study.settings import StudySettings, StudyTask

PACKAGE = "vla_trqam.recipes"
RUNS, DATA, COMMANDS = "runs", "data", "commands.json"
REPORT = "report.json"
OWNED = {
    "seed": "there is a run for each of --seeds",
    "output_dir": "every run has a folder in the study's",
    "preset": "it stands in the table's entry",
    "num_threads": "it is the study's own --num_threads",
    "base_run": "the runs of a task and seed begin with a base that the study makes",
    "policy.path": "the runs of a task and seed begin with a base that the study makes",
    "method": "methods are the study's, and their knobs stand in the table's knobs",
}
"""What flags cannot set, and where it is set instead."""
ReadRun = Callable[[str, Sequence[str]], StateRunConfig]
"""From a recipe's name and the flags of a run to its settings; refuses what cannot work."""


@dataclass(frozen=True)
class Variant:
    """What is compared: a method with its knobs.

    Attributes:
        label: names it in tables, and its folders.
        method: in the registry.
        knobs: that win over the task's.
    """

    label: str
    method: str
    knobs: Mapping[str, Any]


VariantsIn = Callable[[StudyTask], Sequence[Variant]]
"""What is compared in a task."""


@dataclass(frozen=True)
class Step:
    """A command of the study.

    Attributes:
        name: like "lift/trqam_s0".
        command: that begins it.
        folder: what it fills, or the file it writes; the folder around it is made.
        done: is there when it is finished.
        needs: names of the steps before it.
        resume: the command that goes on with it; None for one that is just begun again.
        updates: how many it makes, for the time that is left.
        phases: in which it makes them.
        config: settings of the run that it makes, presets and defaults included.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    done: Path
    needs: tuple[str, ...] = ()
    resume: tuple[str, ...] | None = None
    updates: int = 0
    phases: tuple[str, ...] = ()
    config: StateRunConfig | None = None


@dataclass(frozen=True)
class StudyRun:
    """A run of the grid.

    Attributes:
        task: name.
        label: of its variant.
        seed: training seed.
        folder: its output_dir.
        config: its settings.
        step: that makes it.
    """

    task: str
    label: str
    seed: int
    folder: Path
    config: StateRunConfig
    step: Step


@dataclass(frozen=True)
class Plan:
    """Everything that is to be done, in order.

    Attributes:
        steps: all of them; each after those it needs.
        runs: those of the grid.
    """

    steps: list[Step]
    runs: list[StudyRun]


def make_plan(settings: StudySettings, variants_in: VariantsIn, read: ReadRun) -> Plan:
    """The steps of a study; every run's settings are read, so that a wrong one is told first.

    Args:
        settings: of the study.
        variants_in: what is compared in a task.
        read: see there.

    Raises:
        UserError: a run could not work.
    """
    steps: list[Step] = []
    runs: list[StudyRun] = []
    for task in map(settings.task, settings.tasks):
        if task.data is not None:
            steps.append(_data_step(settings, task))
        for seed in settings.seeds:
            base = _base_step(settings, task, seed, read)
            made = [_run(settings, task, seed, v, base, read) for v in variants_in(task)]
            runs += made
            steps += [base, *(run.step for run in made)]
    return Plan(steps, runs)


def check_commands(plan: Plan, folder: Path) -> None:
    """Keeps the commands of all steps; one that was begun with another is not gone on with.

    A step whose folder is not there is begun anew, whatever its command was. A run has the settings
    that its command named then, whatever the preset says by now.

    Raises:
        UserError: the study in the folder has other settings.
    """
    path = folder / COMMANDS
    before: dict[str, list[str]] = {}
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    for step in plan.steps:
        own, begun = _lasting(step.command), before.get(step.name)
        if begun is not None and begun != own and step.folder.exists():
            changed = sorted(set(own) ^ set(begun))
            raise UserError(
                f"{folder} has a study whose {step.name} was begun with other flags "
                f"({', '.join(changed)}); choose another --output_dir, or remove that folder"
            )
        if step.config is not None and (step.folder / CONFIG_NAME).is_file():
            _check_settings(step.config, step.folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = before | {step.name: _lasting(step.command) for step in plan.steps}
    with written_whole(path) as part:
        part.write_text(json.dumps(every, indent=1) + "\n")


def _check_settings(config: StateRunConfig, folder: Path) -> None:
    try:
        check_begun_with(config, folder / CONFIG_NAME)
    except UserError as error:
        raise UserError(
            f"{error}; a preset has changed since: choose another --output_dir, remove that "
            "folder, or give the preset its values back"
        ) from None


def _lasting(command: Sequence[str]) -> list[str]:
    """A command without what may change when it is gone on with: the interpreter, the threads."""
    return [word for word in command[1:] if not word.startswith("--num_threads=")]


def _data_step(settings: StudySettings, task: StudyTask) -> Step:
    assert task.data is not None
    path = _data_file(settings, task)
    flags = [*as_flags(task.data.flags), f"--output={path}"]
    command = _command(task.data.recipe, flags)
    return Step(f"{task.name}/data", command, path, path)


def _data_file(settings: StudySettings, task: StudyTask) -> Path:
    assert settings.output_dir is not None
    assert task.data is not None
    return settings.output_dir / DATA / task.name / task.data.file


def _base_step(settings: StudySettings, task: StudyTask, seed: int, read: ReadRun) -> Step:
    name = f"{task.name}/base_s{seed}"
    folder = _folder(settings, name)
    flags = [*_task_flags(settings, task, seed), "--steps=0", "--online.steps=0"]
    flags.append(f"--output_dir={folder}")
    config = read(task.recipe, flags)
    return Step(
        name=name,
        command=_command(task.recipe, flags),
        folder=folder,
        done=folder / RECORD_NAME / OUTCOMES,
        needs=() if task.data is None else (f"{task.name}/data",),
        resume=_resume(settings, task, folder),
        config=config,
        updates=config.pretrain.steps,
        phases=(PRETRAIN,),
    )


def _run(
    settings: StudySettings,
    task: StudyTask,
    seed: int,
    variant: Variant,
    base: Step,
    read: ReadRun,
) -> StudyRun:
    name = f"{task.name}/{variant.label}_s{seed}"
    folder = _folder(settings, name)
    flags = [
        *_task_flags(settings, task, seed),
        f"--base_run={base.folder}",
        *_method_flags(task, variant),
        f"--output_dir={folder}",
    ]
    config = read(task.recipe, flags)
    _check_evaluations(config, name)
    step = Step(
        name=name,
        command=_command(task.recipe, flags),
        folder=folder,
        done=folder / REPORT,
        needs=(base.name,),
        resume=_resume(settings, task, folder),
        config=config,
        updates=config.steps + config.online.steps,
        phases=TRAINING_PHASES,
    )
    return StudyRun(task.name, variant.label, seed, folder, config, step)


def _method_flags(task: StudyTask, variant: Variant) -> list[str]:
    knobs = {**task.knobs.get(variant.method, {}), **variant.knobs}
    named = as_flags({f"method.{knob}": value for knob, value in knobs.items()})
    return [f"--method.type={variant.method}", *named]


def shared_settings(
    settings: StudySettings, task: StudyTask, method: str, read: ReadRun
) -> dict[str, Any]:
    """What a method's runs in a task have beside a variant's knobs and a seed, by dotted name.

    Only what is not as the code has it by itself: a later version may have more settings.
    """
    (seed, *_) = settings.seeds
    own = [*_task_flags(settings, task, seed), *_method_flags(task, Variant(method, method, {}))]
    chosen = chosen_settings(read(task.recipe, [*own, f"--output_dir={settings.output_dir}"]))
    where = {"seed", "output_dir", "num_threads"}
    where |= set() if task.data is None else {"dataset.path"}
    return {name: value for name, value in chosen.items() if name not in where}


def _check_evaluations(config: StateRunConfig, name: str) -> None:
    """The end of the offline updates is a point of the learning curve."""
    every = config.evaluate_every
    if every == 0 or (config.steps and config.online.steps and config.steps % every):
        raise UserError(
            f"{name}: --evaluate_every={every} does not meet the end of its {config.steps} offline "
            "updates, where the study compares; take a divisor of --steps"
        )


def _task_flags(settings: StudySettings, task: StudyTask, seed: int) -> list[str]:
    """What all runs of a task and seed share."""
    flags = {"eval.num_workers": 1, "eval.videos": 0, **task.flags, **settings.flags}
    owned = OWNED if task.data is None else {**OWNED, "dataset.path": "the task's data makes it"}
    for name in flags:
        why = owned.get(name.partition(".")[0], owned.get(name))
        if why is not None:
            raise UserError(
                f"the flags of the task {task.name} set {name}, which the study sets by itself: "
                f"{why}"
            )
    if task.data is not None:
        flags["dataset.path"] = str(_data_file(settings, task))
    return [
        f"--preset={task.preset}",
        *as_flags(flags),
        f"--num_threads={settings.num_threads}",
        f"--seed={seed}",
    ]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """``--name=value`` of each, with the value as YAML reads it back."""
    return [f"--{name}={_text(value)}" for name, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and "." not in repr(value):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa}.0e{exponent}" if exponent else repr(value)  # YAML wants the point
    return json.dumps(value)


def _folder(settings: StudySettings, name: str) -> Path:
    assert settings.output_dir is not None
    return settings.output_dir / RUNS / name


def _command(recipe: str, flags: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", f"{PACKAGE}.{recipe}", *flags)


def _resume(settings: StudySettings, task: StudyTask, folder: Path) -> tuple[str, ...]:
    flags = ["--resume=true", f"--output_dir={folder}", f"--num_threads={settings.num_threads}"]
    return _command(task.recipe, flags)

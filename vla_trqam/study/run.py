"""A study from its settings to its page: the plan, the processes, what is written in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vla_trqam.engine.launch import usable_cores
from vla_trqam.study.plan import (
    Plan,
    ReadRun,
    StudyRun,
    VariantsIn,
    check_commands,
    make_plan,
)
from vla_trqam.study.progress import StudyProgress
from vla_trqam.study.results import Result, read_results
from vla_trqam.study.scheduler import LOGS, Scheduler, visible_gpus
from vla_trqam.study.settings import StudySettings

DONE, FAILED, STOPPED = 0, 1, 130


def work[S: StudySettings](
    settings: S,
    variants_in: VariantsIn,
    read: ReadRun,
    write: Callable[[S, Sequence[StudyRun], Sequence[Result]], str],
) -> int:
    """Does what is left of a study, and writes its page; returns the exit status.

    Args:
        settings: of the study.
        variants_in: what is compared in a task.
        read: a run's settings from its flags.
        write: the page, from the finished runs.

    Raises:
        UserError: the settings do not work, or the folder has another study.
    """
    assert settings.output_dir is not None
    plan = make_plan(settings, variants_in, read)
    failed = carried_out(settings, plan)
    if failed is None:
        return STOPPED
    print(write(settings, plan.runs, read_results(plan.runs)))
    print(f"page {settings.output_dir / 'table.md'}")
    if failed:
        print(f"{len(failed)} failed; the same command tries again: {', '.join(failed)}")
    return FAILED if failed else DONE


def carried_out(settings: StudySettings, plan: Plan) -> list[str] | None:
    """Does what is left of a plan; names the steps that failed, or None where it was stopped.

    Raises:
        UserError: the folder has another study.
    """
    folder = settings.output_dir
    assert folder is not None
    check_commands(plan, folder)
    progress = StudyProgress()
    scheduler = Scheduler(
        plan.steps,
        workers=settings.workers or usable_cores(),
        logs=folder / LOGS,
        devices=visible_gpus(),
        say=progress.say,
        show=progress.show,
    )
    whole = scheduler.run()
    progress.close()
    standing = scheduler.standing
    if whole:
        return list(standing.failed)
    done, every = len(standing.done), len(standing.steps)
    print(f"stopped with {done} of {every} steps done; the same command goes on")
    return None

"""Collect demonstrations in several worker processes; the file does not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vla_trqam.data.sources.robomimic.writer import Demonstration
from vla_trqam.envs.processes import in_processes
from vla_trqam.envs.robomimic.demonstrators.record import EpisodePlan, make_env, record_episode
from vla_trqam.envs.robomimic.demonstrators.tasks import DemoTask, demo_task
from vla_trqam.envs.robomimic.env import RobomimicEnv


def collect(task_name: str, plans: Sequence[EpisodePlan], workers: int) -> Iterator[Demonstration]:
    """Play the planned episodes and yield them in the plans' order; 0 workers: in this process."""
    if workers == 0:
        yield from _collect_here(demo_task(task_name), plans)
    else:
        yield from in_processes(_play, plans, workers, _start_worker, task_name)


def _collect_here(task: DemoTask, plans: Sequence[EpisodePlan]) -> Iterator[Demonstration]:
    env = make_env(task)
    try:
        for plan in plans:
            yield record_episode(env, task, plan)
    finally:
        env.close()


_worker: tuple[RobomimicEnv, DemoTask] | None = None


def _start_worker(task_name: str) -> None:
    global _worker
    task = demo_task(task_name)
    _worker = (make_env(task), task)


def _play(plan: EpisodePlan) -> Demonstration:
    assert _worker is not None
    return record_episode(*_worker, plan)

"""Collect demonstrations in several worker processes; the file does not depend on their number."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

from vla_trqam.data.robomimic_writer import Demonstration
from vla_trqam.envs.demonstrators.record import EpisodePlan, make_env, record_episode
from vla_trqam.envs.demonstrators.tasks import DemoTask, demo_task
from vla_trqam.envs.robomimic import RobomimicEnv

_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_AHEAD = 4  # episodes that may wait for each worker: bounds the memory of a long collection


def collect(task_name: str, plans: Sequence[EpisodePlan], workers: int) -> Iterator[Demonstration]:
    """Play the planned episodes and yield them in the plans' order.

    Args:
        task_name: ``lift``, ``can`` or ``square``.
        plans: the episodes.
        workers: processes; 0 plays in this one.
    """
    if workers == 0:
        yield from _collect_here(demo_task(task_name), plans)
        return
    with _single_threaded_children():
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (task_name,)
        )
        try:
            yield from _in_order(pool, plans, workers * _AHEAD)
        finally:
            _stop(pool)


def _collect_here(task: DemoTask, plans: Sequence[EpisodePlan]) -> Iterator[Demonstration]:
    env = make_env(task)
    try:
        for plan in plans:
            yield record_episode(env, task, plan)
    finally:
        env.close()


def _in_order(
    pool: ProcessPoolExecutor, plans: Sequence[EpisodePlan], ahead: int
) -> Iterator[Demonstration]:
    rest = iter(plans)
    waiting: list[Future[Demonstration]] = [pool.submit(_play, p) for p in islice(rest, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting.extend(pool.submit(_play, plan) for plan in islice(rest, 1))


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers now: an interrupted collection must not play its queue to the end."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


@contextlib.contextmanager
def _single_threaded_children() -> Iterator[None]:
    """One thread a worker: the simulator gains nothing from more, and they fight over the cores."""
    saved = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_worker: tuple[RobomimicEnv, DemoTask] | None = None


def _start_worker(task_name: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then stops us
    threading.Thread(target=_follow_parent, daemon=True).start()
    task = demo_task(task_name)
    _worker = (make_env(task), task)


def _follow_parent() -> None:
    """End with the parent, however it ended: a killed one cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _play(plan: EpisodePlan) -> Demonstration:
    assert _worker is not None
    return record_episode(*_worker, plan)

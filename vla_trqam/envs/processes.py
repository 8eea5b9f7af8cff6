"""Episodes played in several processes; what comes out does not depend on their number."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_AHEAD = 4  # episodes that may wait for each worker: bounds the memory of a long collection


def in_processes[P, R](
    play: Callable[[P], R],
    plans: Sequence[P],
    workers: int,
    start: Callable[[str], None],
    task: str,
) -> Iterator[R]:
    """Plays the plans and yields what comes of them, in their order.

    Every worker calls ``start`` once, with the task that all plans are of, and ``play`` with each
    of its plans; both are functions of a module.
    """
    with _single_threaded_children():
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (start, task)
        )
        try:
            yield from _in_order(pool, play, plans, workers * _AHEAD)
        finally:
            _stop(pool)


def _in_order[P, R](
    pool: ProcessPoolExecutor, play: Callable[[P], R], plans: Sequence[P], ahead: int
) -> Iterator[R]:
    rest = iter(plans)
    waiting: list[Future[R]] = [pool.submit(play, p) for p in islice(rest, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting.extend(pool.submit(play, plan) for plan in islice(rest, 1))


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


def _start_worker(start: Callable[[str], None], task: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then stops us
    threading.Thread(target=_follow_parent, daemon=True).start()
    start(task)


def _follow_parent() -> None:
    """End with the parent, however it ended: a killed one cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

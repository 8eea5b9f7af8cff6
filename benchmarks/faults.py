"""Does a run that something befalls end as one that nothing befell?

    python benchmarks/faults.py --n 50

Short runs of both recipes, with real simulators, are killed, asked to stop, robbed of a simulator
or of their disk at moments drawn from the seed, resumed as their user would, and compared with an
undisturbed run: weights, optimizer, lambda, replay, random streams, metrics, outcomes, all to the
bit. Prints a table and exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from failing.runs import KINDS, Kind, ShortRun
from run_results.run_difference import run_differences
from tqdm import tqdm

LONGEST = 900.0
"""Seconds until a program that does not end counts as hanging."""
POLL = 0.001
FIRST_MOMENTS = 5.0
"""Seconds over which moments before the first line of the log are spread."""
WORKER = "vla_trqam.envs.worker"
DEADLINE = "--eval.chunk_deadline=5"
IN_FILES = {
    "killed inside a checkpoint's write": ("checkpoints", "kill"),
    "killed inside the replay's write": ("replay", "kill"),
    "disk full": ("anywhere", "full"),
}
TO_PROCESSES = (
    "SIGKILL",
    "SIGTERM to the launcher",
    "a simulator killed",
    "a simulator stopped",
)
FAULTS = (*TO_PROCESSES, *IN_FILES)


@dataclass(frozen=True)
class Plan:
    """One fault.

    Attributes:
        number: from 0.
        kind: of run.
        fault: which.
        moment: when, as a share of all lines of the log or of all file operations.
    """

    number: int
    kind: Kind
    fault: str
    moment: float


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        plan: its fault.
        where: the moment in words.
        ended: how the disturbed program ended.
        resumes: how often the run was gone on with.
        problems: differences from the undisturbed run, or why there is no comparison.
    """

    plan: Plan
    where: str
    ended: str
    resumes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Undisturbed:
    """The run to compare with.

    Attributes:
        run: itself.
        operations: on files, by area.
    """

    run: ShortRun
    operations: dict[str, int]


def plans(count: int, seed: int, kinds: Sequence[Kind] = KINDS) -> list[Plan]:
    """Every fault in turn, three runs on states for two on images, at moments of the seed."""
    generator = np.random.default_rng(seed)
    turns = [kinds[number % len(kinds)] for number in range(len(kinds))]
    if len(turns) == 2:
        turns = [turns[0], turns[1], turns[0], turns[1], turns[0]]
    return [
        Plan(n, turns[n % len(turns)], FAULTS[n % len(FAULTS)], float(generator.uniform()))
        for n in range(count)
    ]


def undisturbed(kind: Kind, root: Path) -> Undisturbed:
    """Runs it once, counting what it does to files."""
    run = ShortRun(kind, root / f"undisturbed_{kind}")
    counts = root / f"operations_{kind}.json"
    code = _wait(run.start(fault={"counts": str(counts)}))
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}:\n{_tail(run)}")
    return Undisturbed(run, json.loads(counts.read_text()))


def disturb(plan: Plan, whole: Undisturbed, root: Path) -> Outcome:
    """Lets a fault befall a run, goes on with it, and compares."""
    run = ShortRun(plan.kind, root / f"run_{plan.number:03d}")
    if plan.fault in IN_FILES:
        area, act = IN_FILES[plan.fault]
        at = 1 + int(plan.moment * whole.operations[area])
        where = f"file operation {at} of {whole.operations[area]}"
        process = run.start(fault={"area": area, "act": act, "at": at})
        code = _wait(process)
    else:
        code, where = _disturb_processes(plan, run, whole)
    ended = _ending(code)
    problems = list(_wrong_ending(plan, code, run))
    resumes = 0
    while code and resumes < 3 and not problems:
        resumes += 1
        begun = (run.folder / "config.yaml").exists()
        code = _wait(run.resume() if begun else run.start())
    if code:
        problems.append(f"did not end: {_ending(code)}: {_tail(run)}")
    else:
        problems += run_differences(run.folder, whole.run.folder)
    return Outcome(plan, where, ended, resumes, tuple(problems))


def _disturb_processes(plan: Plan, run: ShortRun, whole: Undisturbed) -> tuple[int, str]:
    """Sends a signal when the log has so many lines; the program's end, and the moment in words."""
    lines = whole.run.metrics()
    to_worker = plan.fault.startswith("a simulator")
    # Simulators are at work from the first episode on.
    first = next(n for n, line in enumerate(lines) if "episode_steps" in line) if to_worker else 0
    due = first + int(plan.moment * (len(lines) - first))
    launched = "launcher" in plan.fault
    process = run.start([DEADLINE] if to_worker else [], launcher=launched)
    with _not_left_behind(process):
        reached = _await(lambda: len(run.metrics()) >= due and run.folder.exists(), process)
        if reached and not due:
            time.sleep(plan.moment * len(lines) % 1.0 * FIRST_MOMENTS)
        where = "before the first line of the log" if not due else _position(lines[due - 1], due)
        if reached:
            _send(plan.fault, process)
        trainers = _children(process.pid) if launched else []
        code = _wait(process)
        # A launcher that is gone may leave its trainer a while for its checkpoint.
        _await_end(trainers)
    return code, where


def _send(fault: str, process: subprocess.Popen[bytes]) -> None:
    if fault == "SIGKILL":
        process.kill()
    elif fault == "SIGTERM to the launcher":
        process.terminate()
    else:
        workers = [pid for pid in _children(process.pid) if WORKER in _command(pid)]
        number = signal.SIGKILL if "killed" in fault else signal.SIGSTOP
        for pid in workers[:1]:
            os.kill(pid, number)


def _wrong_ending(plan: Plan, code: int, run: ShortRun) -> Iterator[str]:
    """A program must end as the fault wants, and say so in one sentence where it can."""
    wanted = {
        "SIGKILL": (0, -signal.SIGKILL),
        "a simulator killed": (0,),
        "a simulator stopped": (0,),
        "disk full": (0, 2),
    }.get(plan.fault)
    if wanted is not None and code not in wanted:
        yield f"ended with {_ending(code)}: {_tail(run)}"
    if plan.fault in ("disk full", "SIGTERM to the launcher") and "Traceback" in _said(run):
        yield f"a traceback instead of a sentence: {_tail(run)}"


def _await(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether it came true before the program ended."""
    end = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(POLL)
    return False


def _await_end(pids: Sequence[int]) -> None:
    end = time.monotonic() + LONGEST
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in pids:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def _not_left_behind(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -signal.SIGALRM


def _ending(code: int) -> str:
    if code == -signal.SIGALRM:
        return "hung"
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _position(line: dict[str, object], number: int) -> str:
    return f"{line['phase']}, step {line['step']} (line {number})"


def _said(run: ShortRun) -> str:
    return run.log.read_text(errors="replace") if run.log.exists() else ""


def _tail(run: ShortRun) -> str:
    return " | ".join(_said(run).strip().splitlines()[-4:])[-600:]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a fault and kind of run, then whatever was not equal."""
    rows = ["| fault | runs | resumed | equal to the bit |", "|---|---|---|---|"]
    for fault in FAULTS:
        for kind in KINDS:
            mine = [o for o in outcomes if (o.plan.fault, o.plan.kind) == (fault, kind)]
            if mine:
                resumed = sum(o.resumes > 0 for o in mine)
                equal = sum(not o.problems for o in mine)
                rows.append(f"| {fault} | {len(mine)} {kind} | {resumed} | {equal} |")
    return "\n".join(rows)


def details(outcomes: Sequence[Outcome]) -> str:
    """A line a run: moment and end."""
    return "\n".join(
        f"{o.plan.number:3d} {o.plan.kind:<5}  {o.plan.fault}: {o.where}; {o.ended}, "
        f"{o.resumes} resumes: {'equal' if not o.problems else '; '.join(o.problems)}"
        for o in outcomes
    )


def run_all(todo: Sequence[Plan], root: Path, jobs: int) -> list[Outcome]:
    """All of them, so many at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        kinds = sorted({plan.kind for plan in todo})
        whole = dict(zip(kinds, pool.map(lambda kind: undisturbed(kind, root), kinds), strict=True))
        futures = [pool.submit(disturb, plan, whole[plan.kind], root) for plan in todo]
        equal, found = 0, []
        with tqdm(futures, desc="faults", unit="run") as progress:
            for future in progress:
                found.append(future.result())
                equal += not found[-1].problems
                progress.set_postfix_str(f"{equal} of {len(found)} equal")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=50, help="runs that something befalls")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of runs")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which then stay")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        todo = plans(options.n, options.seed, options.kinds)
        outcomes = run_all(todo, root.resolve(), options.jobs)
    equal = sum(not outcome.problems for outcome in outcomes)
    print(f"{details(outcomes)}\n\n{table(outcomes)}\n\n{equal}/{len(outcomes)} equal")
    return int(equal != len(outcomes))


if __name__ == "__main__":
    sys.exit(main())

r"""The runs that the claims want, by name: which recipe, with which flags.

    python benchmarks/claims/studies.py c2
    python benchmarks/claims/studies.py c2 --folder outputs/c2 --commands > c2.txt
    tr '\n' '\0' < c2.txt | xargs -0 -P2 -I{} sh -c '{}'

Prints a list in YAML, or with ``--commands`` a shell line a run, which does nothing where the run
is finished or diverged, and goes on with one that is not. What only makes a base comes first: the
runs of its task and seed begin with it, to the bit as if each had made its own, and do not evaluate
it again. Of the others seeds are outermost: what is there after the first seed is a whole table.
Data that a task needs is made before, as ``DATA`` says.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import above  # noqa: F401 (benchmarks/)
import yaml
from chain_figure import SCHEMES, offset_kl

from vla_trqam.engine.base_record import OUTCOMES, RECORD_NAME
from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.time_grid import TimeGrid

SEEDS = (0, 1, 2)
EVERY_RUN = ("--num_threads=1", "--eval.num_workers=1", "--eval.videos=0", "--save_freq=5000")
OFFLINE = ("--online.steps=0",)
BASE_ALONE = "--steps=0"
BASE_RECORD = f"{RECORD_NAME}/{OUTCOMES}"
DATA = {
    "can.hdf5": "recipes/make_robomimic_data.py --task=can --episodes=300 --output=can.hdf5",
    "maze.npz": (
        "recipes/make_ogbench_data.py --dataset=pointmaze-medium-navigate-v0 --output=maze.npz"
    ),
    "cube.npz": "recipes/make_ogbench_data.py --dataset=cube-single-play-v0 --output=cube.npz",
}
RUNS = "RUNS"
"""In a flag: the folder of the runs."""


@dataclass(frozen=True)
class Task:
    """Where runs are made.

    Attributes:
        recipe: of the runs.
        flags: of all of them.
        budget: TRQAM's in the recipe's preset.
        num_flow_steps: K of the preset, of whose chain the budget counts the nats.
        a_tenth: a tenth of the data, the base's episodes included; nothing is cloned of it.
    """

    recipe: str
    flags: tuple[str, ...]
    budget: float
    num_flow_steps: int = 4
    a_tenth: tuple[str, ...] = ()


TASKS = {
    "lift": Task(
        "finetune_robomimic",
        ("--evaluate_every=2500",),
        0.5,
        2,
        ("--dataset.num_demos=20", "--base_episodes=6"),
    ),
    "can": Task(
        "finetune_robomimic",
        (
            "--preset=full",
            "--dataset.path=can.hdf5",
            "--eval.max_episode_steps=250",
            "--eval.episodes_during_training=25",
            "--critic.warmup_steps=5000",
            "--steps=5000",
            "--evaluate_every=5000",
            "--base_episodes=100",
        ),
        0.2,
        4,
        ("--dataset.num_demos=30", "--base_episodes=10"),
    ),
    "pointmaze": Task(
        "finetune_ogbench",
        ("--dataset.path=maze.npz", "--steps=6000", "--evaluate_every=6000"),
        2.0,
    ),
    "cube_single": Task(
        "finetune_ogbench",
        (
            "--preset=cube_single",
            "--dataset.path=cube.npz",
            "--steps=5000",
            "--evaluate_every=5000",
        ),
        1.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """A run that a claim wants.

    Attributes:
        name: of its folder.
        recipe: that makes it.
        flags: beside the output_dir.
    """

    name: str
    recipe: str
    flags: tuple[str, ...]


def run_of(task: str, name: str, seed: int, flags: Sequence[str]) -> Run:
    """A run in a task; a later flag wins over an earlier one of the same name."""
    place = TASKS[task]
    given = [*EVERY_RUN, *place.flags, f"--seed={seed}", *flags]
    last = {flag.partition("=")[0]: flag for flag in given}
    return Run(f"{task}_{name}_s{seed}", place.recipe, tuple(last.values()))


def base_of(task: str, name: str, seed: int, flags: Sequence[str] = ()) -> Run:
    """What the runs of a task and seed begin with, by :func:`begun_with`."""
    return run_of(task, name, seed, (*flags, BASE_ALONE, *OFFLINE))


def begun_with(base: Run) -> str:
    """The flag of a run that begins with a base's policy, episodes and evaluation."""
    return f"--base_run={RUNS}/{base.name}"


SHORTER = {"lift": ("--steps=5000", "--evaluate_every=5000")}
"""Half of Lift's preset, for what is compared offline."""
CONDITIONS_ON_CAN = ("critics4", "critics1", "noise4", "tenth")


def methods_of_c1() -> dict[str, tuple[str, ...]]:
    """TRQAM, and QAM at three temperatures."""
    qam = {
        f"qam{beta}": ("--method.type=qam", f"--method.inverse_temperature={beta}")
        for beta in (1, 3, 10)
    }
    return {"trqam": (), **qam}


def c1() -> Iterator[Run]:
    """Imperfect critics: few, few data, a wrong gradient. Offline, where nothing mends them.

    All ways on Lift, four of them on Can.
    """
    critics = {f"critics{n}": (f"--critic.ensemble_size={n}",) for n in (4, 1, 2, 10)}
    noise = {f"noise{size}": (f"--critic.gradient_noise={size}",) for size in (1, 4)}
    tasks = ("lift", "can")
    bases = {
        (task, seed): base_of(task, "base", seed, SHORTER.get(task, ()))
        for seed in SEEDS
        for task in tasks
    }
    yield from bases.values()
    for seed in SEEDS:
        for task in tasks:
            base = bases[task, seed]
            shared = {
                label: (begun_with(base), *flags) for label, flags in {**critics, **noise}.items()
            }
            # The data is for the critic alone, and the base rolls out fewer episodes.
            policy = f"--policy.path={RUNS}/{base.name}/base_policy"
            tenth = {"tenth": (policy, *TASKS[task].a_tenth)}
            for label, flags in {**shared, **tenth}.items():
                if task == "can" and label not in CONDITIONS_ON_CAN:
                    continue
                for method, knobs in methods_of_c1().items():
                    name = f"{label}_{method}"
                    own = (*OFFLINE, *SHORTER.get(task, ()), *flags, *knobs)
                    yield run_of(task, name, seed, own)


def c2() -> Iterator[Run]:
    """Lambda inside against the penalty outside, at three targets."""
    bases = {seed: base_of("lift", "base", seed) for seed in SEEDS}
    yield from bases.values()
    for seed, base in bases.items():
        for target in (0.1, 0.5, 1.0):
            for method in ("trqam", "external_kl"):
                flags = (
                    begun_with(base),
                    f"--method.type={method}",
                    f"--method.kl_budget={target:g}",
                )
                yield run_of("lift", f"{method}_{target:g}", seed, (*OFFLINE, *flags))


def c6() -> Iterator[Run]:
    """The chain: scheme, number of steps and adjoint on three tasks.

    Every budget is worth what the preset's is in the preset's own chain, by the yardstick of
    docs/method.md: a nat of another scheme, or of another number of steps, is another unit. The
    dual's steps are relative, as in C3: what is compared is the chain, not how lambda swings.
    Adjoints are compared at both ends.
    """
    tasks = ("lift", "pointmaze", "cube_single")
    adjoints = {3: ("lean", "scalar"), 4: ("lean",), 6: ("lean",), 10: ("lean", "scalar")}
    bases = {
        (task, steps, seed): base_of(
            task,
            f"base{steps}",
            seed,
            (*SHORTER.get(task, ()), f"--policy.num_flow_steps={steps}"),
        )
        for seed in SEEDS
        for task in tasks
        for steps in adjoints
    }
    yield from bases.values()
    for task, steps, seed in bases:
        for label, scheme in SCHEMES.items():
            budget = TASKS[task].budget * offset_kl(TimeGrid(steps, scheme))
            budget /= offset_kl(TimeGrid(TASKS[task].num_flow_steps, SCHEMES["posterior"]))
            name = label.lower().replace(" ", "_")
            for adjoint in adjoints[steps]:
                flags = (
                    *OFFLINE,
                    *SHORTER.get(task, ()),
                    begun_with(bases[task, steps, seed]),
                    f"--policy.num_flow_steps={steps}",
                    f"--method.scheme={name}",
                    f"--method.adjoint={adjoint}",
                    "--method.dual_steps=relative",
                    f"--method.kl_budget={budget:.3g}",
                )
                yield run_of(task, f"{name}{steps}_{adjoint}", seed, flags)


STUDIES: Mapping[str, Callable[[], Iterator[Run]]] = {"c1": c1, "c2": c2, "c6": c6}
"""C3 and C4 are `recipes/sweep_kl.py`'s and `recipes/compare.py`'s."""


def command(run: Run, folder: Path) -> str:
    """A shell line that makes the run, unless it is finished."""
    own = folder / run.name
    begin = [f"--output_dir={own}", *(f.replace(RUNS, str(folder)) for f in run.flags)]
    recipe = f"python -m vla_trqam.recipes.{run.recipe}"
    go_on = f"{recipe} --resume=true --output_dir={shlex.quote(str(own))}"
    new = f"{recipe} {shlex.join(begin)}"
    last = BASE_RECORD if BASE_ALONE in run.flags else "report.json"
    done, begun, diverged = (
        shlex.quote(str(own / name)) for name in (last, "config.yaml", DIVERGED_NAME)
    )
    return (
        f"test -f {done} || test -f {diverged} || if test -f {begun}; then {go_on}; else {new}; fi"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="of the runs")
    parser.add_argument("--commands", action="store_true", help="shell lines in place of YAML")
    given = parser.parse_args(arguments)
    runs = list(STUDIES[given.study]())
    if given.commands:
        print("\n".join(command(run, given.folder) for run in runs))
    else:
        listed = [{**asdict(run), "flags": list(run.flags)} for run in runs]
        print(yaml.safe_dump(listed, sort_keys=False, width=100), end="")


if __name__ == "__main__":
    main()

"""Make play data for OGBench's tasks, in its own format, with its own oracles.

Example::

    python recipes/make_ogbench_data.py --dataset=cube-single-play-v0 --output=cube.npz

writes that file, and beside it ``cube-val.npz`` with a tenth as many episodes. With ``--shards=10
--output=cubes`` it is a folder of ten such pairs, as OGBench's sets of 10 and 100 million steps.
Killed or stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vla_trqam.config.command_line import exit_status, flags_of
from vla_trqam.envs.ogbench.oracles import PlayedEpisode, PlayPlan, make_player, play_all
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole

SETTINGS_NAME = "settings.json"
SETTINGS = ("dataset", "episodes", "steps", "seed", "shards")
COUNTS = ("goals", "reached")


@dataclass(frozen=True)
class Output:
    """A file to make, and that for validation beside it.

    Attributes:
        train: its path.
        plans: its episodes.
        val_plans: those for validation.
    """

    train: Path
    plans: list[PlayPlan]
    val_plans: list[PlayPlan]

    @property
    def val(self) -> Path:
        """Where those for validation go."""
        return self.train.with_name(f"{self.train.stem}-val.npz")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; an unknown one ends the program with one sentence."""
    parser = flags_of(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="OGBench's name, like cube-single-play-v0")
    add("--output", type=Path, required=True, help="the npz to make, or with --shards the folder")
    add("--episodes", type=int, default=100, help="of a file for training; OGBench's have 1000")
    add("--shards", type=int, default=0, help="files in a folder; 0 for one file alone")
    add("--steps", type=int, default=1000, help="of an episode")
    add("--seed", type=int, default=0, help="determines every episode")
    add(
        "--workers",
        type=int,
        default=2,
        help="processes; 0 plays in this one; the data is the same",
    )
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    """Play the episodes that are not there yet, and write the files.

    Raises:
        UserError: an option is out of range, or the output exists.
    """
    least_of = {"episodes": 1, "steps": 1, "seed": 0, "workers": 0, "shards": 0}
    for name, least in least_of.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise UserError(f"--{name}={value} is too small; it must be at least {least}")
    outputs = _outputs(options)
    parts = _parts(options)
    begun = _begun(parts, options)
    for path in () if begun else _results(outputs, options):
        if path.exists():
            raise UserError(f"{path} exists already; choose another --output")
    make_player(options.dataset).env.close()  # refused before there is a folder
    if not begun:
        _begin(parts, options)
    for output in outputs:
        _make_file(output, parts, options)
    if options.shards and _shards(options).exists():
        os.replace(_shards(options), options.output)
    shutil.rmtree(parts)


def _outputs(options: argparse.Namespace) -> list[Output]:
    """The files to make; those of a folder have the names of OGBench's large sets."""
    if not options.shards:
        if options.output.suffix != ".npz":
            raise UserError(f"--output={options.output} must end in .npz")
        return [_output(options.output, 0, options)]
    if options.output.suffix == ".npz":
        raise UserError(
            f"--output={options.output} must be a folder, for the {options.shards} files of "
            "--shards; only without does it end in .npz"
        )
    names = [f"{options.dataset}-{number:03d}.npz" for number in range(options.shards)]
    return [_output(_shards(options) / name, n, options) for n, name in enumerate(names)]


def _shards(options: argparse.Namespace) -> Path:
    """Where the files of a folder are until all are there: what has its name is whole."""
    return _parts(options) / "shards"


def _results(outputs: Sequence[Output], options: argparse.Namespace) -> Iterator[Path]:
    """What there will be in the end."""
    if options.shards:
        yield options.output
    else:
        yield from (path for output in outputs for path in (output.train, output.val))


def _output(train: Path, shard: int, options: argparse.Namespace) -> Output:
    count = options.episodes + max(1, options.episodes // 10)
    plans = [
        PlayPlan(options.dataset, options.seed, number, options.steps)
        for number in range(shard * count, (shard + 1) * count)
    ]
    return Output(train, plans[: options.episodes], plans[options.episodes :])


def _parts(options: argparse.Namespace) -> Path:
    """The folder of the episodes played so far."""
    whole: Path = options.output
    return whole.with_name(f"{whole.stem if not options.shards else whole.name}.parts")


def _begun(parts: Path, options: argparse.Namespace) -> bool:
    """Whether episodes of these settings are there, so that whatever else is there is of them."""
    path = parts / SETTINGS_NAME
    if not path.exists():
        return False
    settings = {"shards": 0} | json.loads(path.read_text())  # of before there were any
    if settings != {name: getattr(options, name) for name in SETTINGS}:
        raise UserError(
            f"{parts} holds episodes of other settings, {path.read_text()}; go on with those, or "
            "remove it"
        )
    return True


def _begin(parts: Path, options: argparse.Namespace) -> None:
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if options.shards:
            _shards(options).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be made: {error.strerror}") from None
    with written_whole(parts / SETTINGS_NAME) as part:
        part.write_text(json.dumps({name: getattr(options, name) for name in SETTINGS}))


def _make_file(output: Output, parts: Path, options: argparse.Namespace) -> None:
    """Plays the episodes of a file that are not there yet, and writes it."""
    done = parts / f"{output.train.stem}.done"
    if done.exists():
        print(f"{output.train.name} is there already")
        return
    plans = [*output.plans, *output.val_plans]
    _play(plans, parts, options)
    # The last of them is what others wait for.
    _write(output.val, [_part(parts, plan) for plan in output.val_plans])
    goals, reached = _write(output.train, [_part(parts, plan) for plan in output.plans])
    done.touch()
    for plan in plans:
        _part(parts, plan).unlink()
    name = output.train.name if options.shards else output.train
    print(
        f"{name}: {len(output.plans)} episodes of {options.steps} steps; {reached} of "
        f"{goals} goals reached ({reached / max(goals, 1):.0%}); {len(output.val_plans)} more in "
        f"{output.val.name}"
    )


def _part(parts: Path, plan: PlayPlan) -> Path:
    return parts / f"{plan.number:06d}.npz"


def _play(plans: Sequence[PlayPlan], parts: Path, options: argparse.Namespace) -> None:
    """Plays what is missing of these episodes."""
    missing = [plan for plan in plans if not _part(parts, plan).exists()]
    if len(missing) < len(plans):
        print(f"going on after {len(plans) - len(missing)} of {len(plans)} episodes in {parts}")
    start, goals, reached = time.monotonic(), 0, 0
    with tqdm(total=len(missing), desc=options.dataset, unit="episode") as bar:
        episodes = play_all(missing, options.workers)
        for number, (plan, episode) in enumerate(zip(missing, episodes, strict=True), start=1):
            _save(_part(parts, plan), episode)
            goals, reached = goals + episode.goals, reached + episode.reached
            rate = number * options.steps / (time.monotonic() - start)
            bar.set_postfix_str(f"success {reached / max(goals, 1):.0%}, {rate:.0f} steps/s")
            bar.update()


def _save(path: Path, episode: PlayedEpisode) -> None:
    with written_whole(path) as part:
        counts = {name: np.array(getattr(episode, name)) for name in COUNTS}
        np.savez(part, allow_pickle=False, **episode.arrays, **counts)


def _write(output: Path, files: Sequence[Path]) -> tuple[int, int]:
    """One file of all these episodes; returns how many goals they had and reached."""
    episodes = list(_read(files))
    names = [name for name in episodes[0] if name not in COUNTS]
    with written_whole(output) as part:
        arrays = {name: np.concatenate([e[name] for e in episodes]) for name in names}
        np.savez_compressed(part, allow_pickle=False, **arrays)
    return sum(int(e["goals"]) for e in episodes), sum(int(e["reached"]) for e in episodes)


def _read(files: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
    for path in files:
        with np.load(path, allow_pickle=False) as file:
            yield {name: file[name] for name in file.files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    stopped = "stopped; the same command goes on from here."
    return exit_status(lambda: make(parse(arguments)), stopped)


if __name__ == "__main__":
    sys.exit(main())

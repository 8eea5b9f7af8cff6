"""Make play data for OGBench's tasks, in its own format, with its own oracles.

Example::

    python recipes/make_ogbench_data.py --dataset=cube-single-play-v0 --output=cube.npz

writes that file, and beside it ``cube-val.npz`` with a tenth as many episodes. Killed or stopped,
the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from vla_trqam.envs.ogbench.oracles import PlayedEpisode, PlayPlan, make_player, play_all
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole

SETTINGS_NAME = "settings.json"
COUNTS = ("goals", "reached")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; an unknown one ends the program with one sentence."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="OGBench's name, like cube-single-play-v0")
    add("--output", type=Path, required=True, help="the npz to make")
    add("--episodes", type=int, default=100, help="for training; OGBench's data has 1000")
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
    """Play the episodes that are not there yet, then write both files.

    Raises:
        UserError: an option is out of range, or the output exists.
    """
    for name, least in (("episodes", 1), ("steps", 1), ("seed", 0), ("workers", 0)):
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise UserError(f"--{name}={value} is too small; it must be at least {least}")
    output, validation = _outputs(options.output)
    make_player(options.dataset).env.close()  # refused before there is a folder
    parts = _parts(options)
    num_validation = max(1, options.episodes // 10)
    plans = [
        PlayPlan(options.dataset, options.seed, number, options.steps)
        for number in range(options.episodes + num_validation)
    ]
    _play(plans, parts, options)
    files = [_part(parts, plan) for plan in plans]
    goals, reached = _write(output, files[: options.episodes])
    _write(validation, files[options.episodes :])
    shutil.rmtree(parts)
    print(
        f"{output}: {options.episodes} episodes of {options.steps} steps; {reached} of {goals} "
        f"goals reached ({reached / max(goals, 1):.0%}); {num_validation} more in {validation.name}"
    )


def _outputs(output: Path) -> tuple[Path, Path]:
    if output.suffix != ".npz":
        raise UserError(f"--output={output} must end in .npz")
    pair = output, output.with_name(f"{output.stem}-val.npz")
    for path in pair:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --output")
    return pair


def _parts(options: argparse.Namespace) -> Path:
    """The folder of the episodes played so far, which are all of the same settings."""
    folder = options.output.with_suffix(".parts")
    settings = {name: getattr(options, name) for name in ("dataset", "episodes", "steps", "seed")}
    path = folder / SETTINGS_NAME
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(
            f"{folder} holds episodes of other settings, {path.read_text()}; go on with those, or "
            "remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    with written_whole(path) as part:
        part.write_text(json.dumps(settings))
    return folder


def _part(parts: Path, plan: PlayPlan) -> Path:
    return parts / f"{plan.number:06d}.npz"


def _play(plans: Sequence[PlayPlan], parts: Path, options: argparse.Namespace) -> None:
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    try:
        make(parse(arguments))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make demonstrations of mixed quality of Meta-World's tasks, as a LeRobotDataset.

Example::

    python recipes/make_metaworld_data.py --output=metaworld \
        --tasks=button-press-v3,faucet-open-v3,faucet-close-v3,door-unlock-v3

Meta-World's own scripted policies play, with a hand that shakes and an object that is believed
somewhere else; frames are rendered where a policy decides. A column tells where the objects are,
which no policy reads and recipes/make_tiny_vla.py teaches. Killed or stopped, the same command goes
on where it was. Needs `uv sync --extra metaworld`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vla_trqam.config.command_line import exit_status, flags_of
from vla_trqam.config.settings import refuse_below
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.columns import OBJECT_POSITIONS
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.lerobot.family import lerobot_family
from vla_trqam.envs.metaworld.demonstrators import (
    POSES,
    QUALITIES,
    EpisodePlan,
    check_plans,
    episode_plans,
    play_all,
)
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole

SETTINGS_NAME, REPLAY_NAME = "settings.json", "replay"
SETTINGS = ("tasks", "episodes", "qualities", "every", "max_steps", "seed")
AT_LEAST_ONE = ("episodes", "every", "max_steps")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags.

    Raises:
        UserError: an unknown one, or a value that cannot be.
    """
    parser = flags_of(__doc__)
    add = parser.add_argument
    add("--tasks", required=True, help="Meta-World's names, with commas")
    add("--output", type=Path, required=True, help="the dataset's folder, to be made")
    add("--episodes", type=int, default=240, help="the tasks in turn")
    add("--qualities", default=",".join(QUALITIES), help="of the demonstrators, in turn")
    add("--every", type=int, default=8, help="steps from frame to frame: a policy's chunk")
    add("--max_steps", type=int, default=100, help="control steps after which an episode is cut")
    add("--seed", type=int, default=0, help="determines every episode")
    add("--repo_id", default="local/metaworld", help="the dataset's name")
    add("--workers", type=int, default=2, help="processes; 0 plays in this one; all is the same")
    options = parser.parse_args(arguments)
    refuse_below({name: getattr(options, name) for name in AT_LEAST_ONE}, 1)
    refuse_below({name: getattr(options, name) for name in ("seed", "workers")}, 0)
    return options


def make(options: argparse.Namespace) -> None:
    """Play the episodes that are not there yet, and write the dataset.

    Raises:
        UserError: an option cannot be, the output exists, or Meta-World is not installed.
    """
    if options.output.exists():
        raise UserError(f"{options.output} exists already; name another --output")
    qualities = options.qualities.split(",")
    check_plans(options.episodes, qualities)
    family = lerobot_family("metaworld", task=options.tasks, max_episode_steps=options.max_steps)
    plans = episode_plans(
        options.seed,
        options.episodes,
        len(family.task_texts),
        qualities,
        options.every,
    )
    parts: Path = options.output.with_name(f"{options.output.name}.parts")
    replay = _begun(parts, options, family)
    _play(replay, plans, options)
    stats = replay.stats
    write_lerobot_dataset(
        replay,
        options.output,
        repo_id=options.repo_id,
        fps=int(family.control_rate),
        robot_type="sawyer",
        use_videos=True,
    )
    replay.close()
    shutil.rmtree(parts)
    share = stats.successes / stats.episodes
    print(f"{options.output}: {stats.episodes} episodes, {stats.steps} steps, success {share:.0%}")


def _begun(parts: Path, options: argparse.Namespace, family: EnvFamily) -> Replay:
    """What was played so far, of these settings."""
    path, settings = parts / SETTINGS_NAME, {name: getattr(options, name) for name in SETTINGS}
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise UserError(
                f"{parts} holds episodes of other settings, {path.read_text()}; go on with those, "
                "or remove it"
            )
        return Replay.open(parts / REPLAY_NAME)
    assert family.state_size is not None
    parts.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(parts / REPLAY_NAME, ignore_errors=True)  # of one that was killed as it was made
    replay = Replay.create(
        parts / REPLAY_NAME,
        observation_dim=family.state_size,
        action_dim=family.action_size,
        capacity=options.episodes * options.max_steps,
        cameras=dict(family.cameras),
        frame_capacity=options.episodes * (options.max_steps // options.every + 2),
        columns={OBJECT_POSITIONS: ("float32", (len(POSES),))},
    )
    with written_whole(path) as part:
        part.write_text(json.dumps(settings))
    return replay


def _play(replay: Replay, plans: Sequence[EpisodePlan], options: argparse.Namespace) -> None:
    """Plays what is missing."""
    done = replay.num_episodes
    if done:
        print(f"going on after {done} of {len(plans)} episodes")
    played = play_all(
        options.tasks.split(","),
        plans[done:],
        max_steps=options.max_steps,
        workers=options.workers,
    )
    with tqdm(total=len(plans), initial=done, desc="metaworld", unit="episode") as bar:
        for plan, episode in zip(plans[done:], played, strict=True):
            replay.add(episode, source=plan.quality)
            stats = replay.stats
            bar.set_postfix_str(f"success {stats.successes / stats.episodes:.0%}")
            bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    stopped = "stopped; the same command goes on from here."
    return exit_status(lambda: make(parse(arguments)), stopped)


if __name__ == "__main__":
    sys.exit(main())

"""How the packed tiny π0 and its dataset came to be; makes both anew (about an hour on two cores).

python recipes/make_tiny_vla.py --output=lift_pi0
python recipes/make_tiny_vla.py --policy=smolvla --output=lift_smolvla
python recipes/make_tiny_vla.py --policy=smolvla --dataset=metaworld --output=metaworld_smolvla

A policy with π0's or SmolVLA's stock forward code and small widths: its vision-language model
learns where things are (images to the objects' poses, by instruction); its action expert clones a
few demonstrations on the frozen model. Without --dataset they are Lift's: rendered, together with
random scenes, and written as a LeRobotDataset with images where a policy could have decided. With
one, it is what recipes/make_metaworld_data.py wrote, and the policy alone is made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from tqdm import tqdm
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.tiny.checkpoints import (
    flow_features,
    tiny_pi0_config,
    tiny_smolvla_config,
    write_checkpoint,
)
from vla_trqam.adapters.tiny.lessons import Lesson, action_chunks, joined, lesson_of_dataset
from vla_trqam.adapters.tiny.pretraining import (
    Progress,
    Scenes,
    cached_prefixes,
    clone_demonstrations,
    learn_poses,
    pose_targets,
    statistics,
)

import vla_trqam.data
from vla_trqam.config.command_line import exit_status, flags_of
from vla_trqam.config.settings import refuse_below
from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.lerobot.writer import write_episodes
from vla_trqam.data.sources.robomimic.hdf5 import read_robomimic
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.images import CameraSettings, RobomimicImageEnv
from vla_trqam.envs.robomimic.render_demos import RenderedDemo, initial_scenes, render_demos
from vla_trqam.errors import UserError
from vla_trqam.files import written_whole

DEMOS = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")
CAMERAS = CameraSettings(("agentview",), image_size=96, shadows=False)
CHUNK, STRIDE, CONTROL_FREQUENCY, FLOW_STEPS = 8, 4, 20, 5
IMAGE_SIZE, WIDTH, PATCH = 96, 64, 12
SHORT_TEXT, BESIDE_TEXT = 24, 2
"""Tokens of an instruction, a byte each, that the tiny configs have; and a newline and an end."""
FIRST_SCENE_SEED = 7_000_000
AT_LEAST_ONE = ("pose_steps", "clone_steps", "episodes", "num_workers", "num_threads")
OF_LIFT = ("demos", "filter_key", "scenes", "episodes", "num_workers")
OF_DATASET = ("cloned_episodes",)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags.

    Raises:
        UserError: an unknown one, or a value that cannot be.
    """
    parser = flags_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to make: policy/ and dataset/")
    add("--policy", choices=("pi0", "smolvla"), default="pi0")
    add("--demos", type=Path, default=DEMOS, help="Robomimic HDF5 file of Lift")
    add("--filter_key", help="demonstrations that the expert clones; all unless given")
    add("--dataset", type=Path, help="a LeRobotDataset with the objects' positions, not --demos")
    add("--cloned_episodes", type=int, help="of --dataset, the first so many; all unless given")
    add("--scenes", type=int, default=1500, help="random scenes beside the demonstrations")
    add("--pose_steps", type=int, default=3000)
    add("--clone_steps", type=int, default=1200, help="few: the policy is to be mediocre")
    add("--episodes", type=int, default=120, help="demonstrations in the dataset")
    add("--seed", type=int, default=0)
    add("--num_workers", type=int, default=2, help="simulator processes")
    add("--num_threads", type=int, default=2, help="torch's threads")
    options = parser.parse_args(arguments)
    _refuse_the_others(parser, options)
    refuse_below({name: getattr(options, name) for name in AT_LEAST_ONE}, 1)
    refuse_below({name: getattr(options, name) for name in ("scenes", "seed")}, 0)
    return options


def _refuse_the_others(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Flags of the source of demonstrations that was not chosen."""
    how, unread = ("without", OF_DATASET) if options.dataset is None else ("with", OF_LIFT)
    for name in unread:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name} says nothing {how} --dataset; leave it out")


def make(options: argparse.Namespace) -> None:
    """Renders or reads, pretrains and writes.

    Raises:
        UserError: the output exists, or the demonstrations cannot be repeated or read.
    """
    if options.output.exists():
        raise UserError(f"{options.output} exists already; name another --output")
    torch.set_num_threads(options.num_threads)
    if options.dataset is not None:
        lesson = lesson_of_dataset(
            options.dataset,
            chunk=CHUNK,
            image_size=IMAGE_SIZE,
            cloned_episodes=options.cloned_episodes,
        )
        with _folder(options.output) as part:
            write_policy(options, lesson, part / "policy")
        return
    total = len(read_robomimic(options.demos).demos)
    read_robomimic(options.demos, filter_key=options.filter_key)  # refused before the rendering
    rendered = render_demos(options.demos, CAMERAS, every=1, num_workers=options.num_workers)
    demos = list(tqdm(rendered, total=total, desc="demonstrations", unit="episode"))
    with _folder(options.output) as part:
        write_policy(options, lesson_of_lift(options, demos), part / "policy")
        write_dataset(demos[: options.episodes], part / "dataset")


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """There whole or not at all."""
    with written_whole(output) as part:
        part.mkdir(parents=True)
        yield part


def lesson_of_lift(options: argparse.Namespace, demos: Sequence[RenderedDemo]) -> Lesson:
    """The demonstrations, random scenes beside them, and those of the filter key to be cloned."""
    seen, cloned = demonstrated(demos), cloned_demos(options, demos)
    scenes = random_scenes(options, seen.texts[0])
    return Lesson(
        # The random scenes are the more various, so they are repeated until they are about as many.
        looks=joined(seen, scenes, max(1, len(seen) // max(1, len(scenes)))),
        cloned=demonstrated(cloned),
        chunks=np.concatenate([action_chunks(demo.episode.actions, CHUNK) for demo in cloned]),
        states=seen.states,
        actions=np.concatenate([demo.episode.actions for demo in demos]),
        cameras=dict.fromkeys(CAMERAS.names, (CAMERAS.image_size, CAMERAS.image_size, 3)),
    )


def write_policy(options: argparse.Namespace, lesson: Lesson, folder: Path) -> None:
    """Pretrains and writes the policy."""
    config = config_of(options, lesson)
    stats = statistics(lesson.states, lesson.actions, tuple(lesson.cameras))
    write_checkpoint(config, stats, folder)
    policy = load_policy(folder, lora=None)
    with bar("poses", options.pose_steps) as progress:
        learn_poses(
            policy,
            lesson.looks,
            steps=options.pose_steps,
            batch_size=64,
            lr=1e-3,
            seed=options.seed,
            progress=progress,
        )
    with bar("actions", options.clone_steps) as progress:
        clone_demonstrations(
            policy,
            cached_prefixes(policy, lesson.cloned),
            lesson.chunks,
            steps=options.clone_steps,
            batch_size=128,
            lr=1e-3,
            seed=options.seed,
            progress=progress,
        )
    policy.save_pretrained(folder)


def config_of(options: argparse.Namespace, lesson: Lesson) -> PreTrainedConfig:
    """The architecture; SmolVLA's names a folder with its vision-language model's, made beside."""
    (shape, *_) = lesson.cameras.values()
    features = flow_features(
        lesson.states.shape[1], lesson.actions.shape[1], tuple(lesson.cameras), shape[0]
    )
    shared: dict[str, Any] = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "max_state_dim": 16}
    shared["license"] = "apache-2.0"
    longest = max(len(text.encode()) for text in lesson.looks.texts) + BESIDE_TEXT
    if longest > SHORT_TEXT:  # which would be cut
        shared["tokenizer_max_length"] = longest
    if options.policy == "smolvla":
        vlm = options.output.absolute().with_name(f"{options.output.name}_vlm")
        size = IMAGE_SIZE
        return tiny_smolvla_config(features, vlm, image_size=size, num_steps=FLOW_STEPS, **shared)
    return tiny_pi0_config(
        features,
        image_resolution=(IMAGE_SIZE, IMAGE_SIZE),
        num_inference_steps=FLOW_STEPS,
        vision_width=WIDTH,
        vision_mlp_dim=2 * WIDTH,
        vision_depth=2,
        patch_size=PATCH,
        **shared,
    )


def cloned_demos(options: argparse.Namespace, demos: Sequence[RenderedDemo]) -> list[RenderedDemo]:
    """The demonstrations of the filter key."""
    file = read_robomimic(options.demos, filter_key=options.filter_key)
    names = {demo.name for demo in file.demos}
    return [demo for demo in demos if demo.name in names]


def demonstrated(demos: Sequence[RenderedDemo]) -> Scenes:
    """What was seen before every action."""
    episodes = [demo.episode for demo in demos]
    return Scenes(
        images={
            camera: np.concatenate([e.images[camera][: len(e.actions)] for e in episodes])
            for camera in CAMERAS.names
        },
        states=np.concatenate([e.observations[:-1] for e in episodes]),
        poses=pose_targets(np.concatenate([demo.objects[:-1] for demo in demos])),
        texts=[str(episodes[0].task)],
        told=np.zeros(sum(len(e.actions) for e in episodes), np.int64),
    )


def random_scenes(options: argparse.Namespace, task: str) -> Scenes:
    """Objects where no demonstration has them."""
    env = RobomimicImageEnv(
        env_meta_for("Lift"),
        max_episode_steps=1000,
        cameras=CAMERAS.names,
        image_size=CAMERAS.image_size,
        shadows=CAMERAS.shadows,
        render_every=1000,
    )
    seeds = range(FIRST_SCENE_SEED, FIRST_SCENE_SEED + options.scenes)
    scenes = initial_scenes(env, seeds, 14, np.random.default_rng(options.seed))
    looks = list(tqdm(scenes, total=options.scenes, desc="random scenes", unit="scene"))
    env.close()
    return Scenes(
        images={c: np.stack([seen["pixels"][c] for seen, _ in looks]) for c in CAMERAS.names},
        states=np.stack([seen["agent_pos"] for seen, _ in looks]),
        poses=pose_targets(np.stack([objects for _, objects in looks])),
        texts=[task],
        told=np.zeros(len(looks), np.int64),
    )


def write_dataset(demos: Sequence[RenderedDemo], folder: Path) -> None:
    """Writes the demonstrations as a LeRobotDataset whose frames are new every few steps."""
    episodes = [thinned(demo.episode) for demo in demos]
    write_episodes(
        episodes, folder, repo_id="local/lift_images", fps=CONTROL_FREQUENCY, robot_type="panda"
    )


def thinned(episode: Episode) -> Episode:
    """The episode with every fourth frame, and the one at which it was cut."""
    observed = np.arange(len(episode.actions) + 1) % STRIDE == 0
    observed[-1] = not episode.terminated
    kept = observed[episode.where_observed]
    images = {camera: frames[kept] for camera, frames in episode.images.items()}
    return replace(episode, images=images, observed=observed)


@contextmanager
def bar(name: str, steps: int) -> Iterator[Progress]:
    """A progress bar with the loss."""
    with tqdm(total=steps, desc=name, unit="step") as shown:

        def progress(done: int, values: dict[str, float]) -> None:
            shown.update(done)
            shown.set_postfix(values, refresh=False)

        yield progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return exit_status(lambda: make(parse(arguments)), "interrupted; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())

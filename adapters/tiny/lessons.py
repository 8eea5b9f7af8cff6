"""What a tiny policy is pretrained on: looks at scenes, and what demonstrators did next.

From a LeRobotDataset that tells where things are, as `recipes/make_metaworld_data.py` writes it.
Lift's are rendered by `recipes/make_tiny_vla.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from vla_trqam.adapters.tiny.pretraining import Scenes

from vla_trqam.data.episode import Episode
from vla_trqam.data.frame_files import ImageShape
from vla_trqam.data.sources.lerobot.columns import OBJECT_POSITIONS
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.errors import UserError


@dataclass(frozen=True)
class Lesson:
    """Everything that a policy is pretrained on.

    Attributes:
        looks: what its vision-language model learns poses from.
        cloned: N looks before a decision.
        chunks: what was done from each of them on, (N, H, A) in the robot's units.
        states: (T, S) of all steps, for the statistics.
        actions: (T, A) likewise.
        cameras: name -> (height, width, 3), as an environment shows them.
    """

    looks: Scenes
    cloned: Scenes
    chunks: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    cameras: Mapping[str, ImageShape]


def lesson_of_dataset(
    root: Path, *, chunk: int, image_size: int, cloned_episodes: int | None = None
) -> Lesson:
    """From a dataset with the column :data:`OBJECT_POSITIONS`.

    Args:
        root: its folder.
        chunk: H.
        image_size: height and width that frames are shrunk to, as the policy would.
        cloned_episodes: how many of the first are cloned; None for all.

    Raises:
        UserError: the folder is no such dataset, or is damaged.
    """
    reader = LeRobotReader(LeRobotConfig("local/lesson", root=root, columns=(OBJECT_POSITIONS,)))
    if cloned_episodes is not None and not 1 <= cloned_episodes <= reader.num_episodes:
        raise UserError(
            f"--cloned_episodes={cloned_episodes} must be 1 to {reader.num_episodes}, the episodes "
            f"of {root}"
        )
    episodes = [_shrunk(episode, image_size) for episode in reader.episodes()]
    cloned = episodes[:cloned_episodes]
    return Lesson(
        looks=scenes_of(episodes),
        cloned=scenes_of(cloned),
        chunks=np.concatenate([_chunks_at_decisions(episode, chunk) for episode in cloned]),
        states=np.concatenate([episode.observations[:-1] for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        cameras=dict(reader.cameras),
    )


def scenes_of(episodes: Sequence[Episode]) -> Scenes:
    """All looks before an action, with the positions of the objects."""
    texts = sorted({str(episode.task) for episode in episodes})
    taken = [_decisions(episode) for episode in episodes]
    pairs = list(zip(episodes, taken, strict=True))
    told = [np.full(len(at), texts.index(str(e.task)), np.int64) for e, at in pairs]
    return Scenes(
        images={
            camera: np.concatenate([e.images[camera][: len(at)] for e, at in pairs])
            for camera in episodes[0].images
        },
        states=np.concatenate([e.observations[at] for e, at in pairs]),
        poses=np.concatenate([e.columns[OBJECT_POSITIONS][at] for e, at in pairs]),
        texts=texts,
        told=np.concatenate(told),
    )


def joined(first: Scenes, second: Scenes, times: int = 1) -> Scenes:
    """Both, the second repeated."""
    texts = [*first.texts, *(text for text in second.texts if text not in first.texts)]
    moved = np.array([texts.index(text) for text in second.texts], np.int64)[second.told]
    return Scenes(
        images={
            c: np.concatenate([first.images[c], *[second.images[c]] * times]) for c in first.images
        },
        states=np.concatenate([first.states, *[second.states] * times]),
        poses=np.concatenate([first.poses, *[second.poses] * times]),
        texts=texts,
        told=np.concatenate([first.told, *[moved] * times]),
    )


def action_chunks(actions: np.ndarray, length: int) -> np.ndarray:
    """The H actions from every step on, the last one repeated: (T, A) -> (T, H, A)."""
    steps = np.arange(len(actions))[:, None] + np.arange(length)
    return actions[np.minimum(steps, len(actions) - 1)]


def _decisions(episode: Episode) -> np.ndarray:
    """Steps before an action at which a frame was taken, increasing."""
    return np.flatnonzero(episode.where_observed[:-1])


def _chunks_at_decisions(episode: Episode, length: int) -> np.ndarray:
    return action_chunks(episode.actions, length)[_decisions(episode)]


def _shrunk(episode: Episode, size: int) -> Episode:
    images = {camera: shrunk(np.asarray(frames), size) for camera, frames in episode.images.items()}
    return Episode(**{**vars(episode), "images": images})


def shrunk(frames: np.ndarray, size: int) -> np.ndarray:
    """Square frames as LeRobot's policies shrink them: (F, L, L, 3) -> (F, size, size, 3) uint8.

    Raises:
        UserError: they are not square.
    """
    if frames.shape[1] != frames.shape[2]:
        raise UserError(f"frames of {frames.shape[1]} x {frames.shape[2]} are not square")
    if frames.shape[1] == size:
        return frames
    return np.concatenate([_smaller(part, size) for part in _parts(frames)])


def _parts(frames: np.ndarray) -> Iterable[np.ndarray]:
    return np.array_split(frames, -(-len(frames) // 64))


def _smaller(frames: np.ndarray, size: int) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    found = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return found.round().byte().permute(0, 2, 3, 1).contiguous().numpy()

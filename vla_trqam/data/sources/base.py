"""The seam of the datasets: whatever yields episodes fills a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Protocol

from vla_trqam.data.episode import Episode
from vla_trqam.data.frame_files import ImageShape
from vla_trqam.data.replay import Replay
from vla_trqam.data.replay_files import ColumnSpec
from vla_trqam.errors import UserError

SAVED_EVERY = 30.0
"""Seconds of reading that are lost at most where what was read is kept."""


@dataclass(frozen=True)
class Sizes:
    """What a replay must be made for, to hold a source's episodes.

    Attributes:
        observation_dim: S.
        action_dim: A.
        num_steps: of all episodes, at most.
        cameras: name -> (height, width, channels); None where there are states alone.
        num_frames: of all episodes, at most.
        tasks_of_rows: whether what the policy is told may change within an episode.
        columns: further ones: name -> dtype and shape of one step's entry.
    """

    observation_dim: int
    action_dim: int
    num_steps: int
    cameras: Mapping[str, ImageShape] | None = None
    num_frames: int = 0
    tasks_of_rows: bool = False
    columns: Mapping[str, ColumnSpec] = field(default_factory=dict)


class Source(Protocol):
    """A dataset that was opened and checked. Reading it twice gives the same."""

    @property
    def where(self) -> str:
        """How messages name it, at the beginning of a sentence."""

    @property
    def sizes(self) -> Sizes:
        """What a replay must be made for."""

    def episodes(self, first: int = 0) -> Iterator[Episode]:
        """Every episode from number `first` on, in order; read as they are asked for.

        Raises:
            UserError: one cannot be read.
        """

    def notes(self) -> list[str]:
        """What it holds and what is assumed of it, a line each, to be printed once."""


def create_replay(
    path: Path,
    sources: Sequence[Source],
    *,
    more_steps: int = 0,
    more_frames: int = 0,
    lent_frames: int = 0,
) -> Replay:
    """An empty replay with room for the sources and what is collected later.

    Args:
        path: its folder.
        sources: what it will be filled from.
        more_steps: room for so many besides.
        more_frames: likewise.
        lent_frames: see `Replay.create`.
    """
    first, every = sources[0].sizes, [source.sizes for source in sources]
    return Replay.create(
        path,
        observation_dim=first.observation_dim,
        action_dim=first.action_dim,
        capacity=sum(sizes.num_steps for sizes in every) + more_steps,
        cameras=first.cameras,
        frame_capacity=sum(sizes.num_frames for sizes in every) + more_frames,
        tasks_of_rows=any(sizes.tasks_of_rows for sizes in every),
        columns=first.columns,
        lent_frames=lent_frames,
    )


def fill(
    replay: Replay,
    source: Source,
    name: str,
    say: Callable[[str], None] = print,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Put every episode of the source into the replay; goes on where a call was interrupted.

    Args:
        replay: made for these sizes.
        source: what is read. Episodes that the replay has of this `name` are not read again.
        name: that the episodes get there.
        say: gets each of the source's notes.
        save: called every :data:`SAVED_EVERY` seconds, and at the end of what was read.

    Raises:
        UserError: the sizes differ or there is no room, and nothing is added then; or an episode
            cannot be read.
    """
    done = int((replay.episodes().source == name).sum())
    _check_fit(replay, source, done)
    for note in source.notes():
        say(f"{name}: {note}")
    saved = monotonic()
    for episode in source.episodes(done):
        replay.add(episode, source=name)
        if monotonic() - saved >= SAVED_EVERY:
            save()
            saved = monotonic()
    save()


def _check_fit(replay: Replay, source: Source, done: int) -> None:
    sizes, room = source.sizes, replay.capacity - replay.num_steps
    found = sizes.observation_dim, sizes.action_dim
    wanted = replay.observation_dim, replay.action_dim
    if found != wanted:
        raise UserError(
            f"{source.where} has observations and actions of {found}, but the replay {replay.path} "
            f"is for {wanted}."
        )
    if not done and sizes.num_steps > room:
        raise UserError(
            f"{source.where} has {sizes.num_steps} steps, but the replay {replay.path} has room "
            f"for {room}: create it with a larger capacity."
        )

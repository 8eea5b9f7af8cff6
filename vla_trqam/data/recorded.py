"""What a replay's folder holds, to be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vla_trqam.data.episode import Episodes, ReplayStats, SourceStats
from vla_trqam.data.frame_files import FRAMES_NAME, FrameIndex, ImageShape
from vla_trqam.data.frames import (
    STATE_KEY,
    TASK_KEY,
    FrameLender,
    FrameObservation,
    Frames,
    ImageDtype,
    image_key,
)
from vla_trqam.data.replay_files import Column, ColumnSpec, Header, column_array
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.errors import UserError


class RecordedEpisodes:
    """The episodes of a folder that count: the part of a `Replay` that reads.

    Attributes:
        revision: changes when episodes are taken away: samplers then start afresh.
    """

    revision = 0

    def __init__(self, path: Path, header: Header) -> None:
        """Map the arrays of the folder."""
        self.path = path
        self._header = header
        self._columns = {name: Column(path, name, spec) for name, spec in header.arrays().items()}
        self._frames = Frames.beside(path, header.capacity)

    @property
    def observation_dim(self) -> int:
        """O."""
        return self._header.observation_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return self._header.action_dim

    @property
    def capacity(self) -> int:
        """Largest number of steps."""
        return self._header.capacity

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self._header.num_episodes

    @property
    def num_steps(self) -> int:
        """Steps that count, over all episodes."""
        return self._header.num_steps

    @property
    def observations(self) -> np.ndarray:
        """Read-only map (num_steps + num_episodes, O): T + 1 rows an episode."""
        return self._rows("observations")[: self.num_steps + self.num_episodes]

    @property
    def actions(self) -> np.ndarray:
        """Read-only map (num_steps, A)."""
        return self._rows("actions")[: self.num_steps]

    @property
    def rewards(self) -> np.ndarray:
        """Read-only map (num_steps,), as stored."""
        return self._rows("rewards")[: self.num_steps]

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Further ones: name -> dtype and shape of one step's entry."""
        return dict(self._header.columns)

    def column(self, name: str) -> np.ndarray:
        """Read-only map (num_steps, ...) of a further column.

        Raises:
            UserError: there is no such column.
        """
        if name not in self._header.columns:
            known = ", ".join(self._header.columns) or "none"
            raise UserError(f"The replay {self.path} has no column {name!r}; it has {known}.")
        return self._rows(column_array(name))[: self.num_steps]

    @property
    def cameras(self) -> dict[str, ImageShape]:
        """Name -> (height, width, channels); none in a replay of states alone."""
        return {} if self._frames is None else dict(self._frames.header.cameras)

    @property
    def frame_capacity(self) -> int:
        """Largest number of frames."""
        return self._seen.header.frame_capacity

    @property
    def num_frames(self) -> int:
        """Frames that count."""
        return self.frame_index.num_frames

    @property
    def frame_index(self) -> FrameIndex:
        """Which frame belongs to which row of `observations`."""
        return self._seen.index(self._num_rows)

    def images(self, camera: str) -> np.ndarray:
        """Read-only map (num_frames, H, W, C) uint8 of what is here, see `borrow`.

        Raises:
            UserError: there is no such camera.
        """
        return self._seen.images(camera, self.num_frames)

    def pictures(self, camera: str, frames: np.ndarray) -> np.ndarray:
        """Some of a camera's frames, wherever they lie: (F,) -> (F, H, W, C) uint8.

        Raises:
            UserError: there is no such camera, or one cannot be read.
        """
        return self._seen.pictures([camera], frames, self.num_frames)[camera]

    def borrow(self, lender: FrameLender) -> None:
        """From now on the frames that lie elsewhere are had from there.

        Raises:
            UserError: it has not as many as the replay has no copy of.
        """
        lent = self._seen.header.lent_frames
        if lender.num_frames != lent:
            raise UserError(
                f"{lent} frames of the replay {self.path} lie in the datasets that it was filled "
                f"from, and those given have {lender.num_frames}: are they the same?"
            )
        self._seen.lender = lender

    def task_of_episodes(self) -> list[str]:
        """One text an episode, its first."""
        return self._seen.tasks_of_episodes(slice(self.num_episodes))

    def task_of_rows(self, rows: np.ndarray) -> list[str]:
        """One text for each of these rows of `observations`."""
        if self._seen.header.tasks_of_rows:
            return self._seen.tasks_of_rows(rows)
        first = self.episodes().first_observation
        return self._seen.tasks_of_episodes(np.searchsorted(first, rows, side="right") - 1)

    def tasks(self) -> list[str]:
        """Every text that a policy is told in some row, sorted."""
        if self._seen.header.tasks_of_rows:
            return sorted(set(self._seen.tasks_of_rows(slice(self._num_rows))))
        return sorted(set(self.task_of_episodes()))

    def observation_at(
        self, rows: np.ndarray, *, image_dtype: ImageDtype = "float32"
    ) -> FrameObservation:
        """What is seen at rows of `observations`, in LeRobot's raw format.

        Args:
            rows: (B,). Where no frame was taken, the last one before it is shown.
            image_dtype: float32 in [0, 1] as LeRobotDataset gives, or uint8 to be divided by 255
                on the device, which moves a quarter of the bytes.
        """
        frames = self.frame_index.frames(rows)
        state = self.observations.take(rows, axis=0)
        observation: FrameObservation = {STATE_KEY: torch.from_numpy(state)}
        for camera, taken in self._seen.pictures(self.cameras, frames, self.num_frames).items():
            image = torch.from_numpy(taken).permute(0, 3, 1, 2)
            if image_dtype == "float32":
                image = image.float() / 255
            observation[image_key(camera)] = image.contiguous()
        observation[TASK_KEY] = self.task_of_rows(rows)
        return observation

    @property
    def stats(self) -> ReplayStats:
        """Counts, in total and by source."""
        episodes = self.episodes()
        by_source = {}
        for name in self._header.sources:
            mine = episodes.source == name
            by_source[name] = SourceStats(
                episodes=int(mine.sum()),
                steps=int(episodes.num_steps[mine].sum()),
                successes=int(episodes.success[mine].sum()),
            )
        successes = int(episodes.success.sum())
        return ReplayStats(self.num_episodes, self.num_steps, successes, by_source)

    def episodes(self, which: slice = slice(None)) -> Episodes:
        """The table of all episodes, or of those in the slice."""
        table = self._rows("episodes")[: self.num_episodes]
        number = np.arange(len(table))[which]
        first_step, num_steps, terminated, truncated, success, source = table[which].T
        return Episodes(
            first_step=first_step,
            first_observation=first_step + number,  # one extra row for every episode before
            num_steps=num_steps,
            terminated=terminated.astype(bool),
            truncated=truncated.astype(bool),
            success=success.astype(bool),
            source=np.array(self._header.sources, dtype=np.str_)[source],
        )

    def rewards_as(self, reward: RewardSpec) -> np.ndarray:
        """(num_steps,) what the critic is to learn from, by each step's source."""
        if not reward.of_sources:
            return reward.apply(self.rewards)
        episodes = self.episodes()
        return reward.apply(self.rewards, np.repeat(episodes.source, episodes.num_steps))

    def returns_to_go(self, discount: float, reward: RewardSpec) -> np.ndarray:
        """Exact Monte-Carlo return of every step, (num_steps,) float64.

        G_t = sum over i of γ^i r_{t+i} up to the end of the episode, and after a failure beyond it
        (:meth:`RewardSpec.after_failure`); NaN in episodes that did not terminate, whose return is
        unknown.
        """
        returns = self.rewards_as(reward).astype(np.float64)
        episodes = self.episodes()
        failed = np.flatnonzero(episodes.terminated & ~episodes.success)
        last = episodes.first_step[failed] + episodes.num_steps[failed] - 1
        returns[last] += discount * reward.after_failure(discount, episodes.source[failed])
        remaining = np.concatenate(
            [np.arange(n, 0, -1) for n in episodes.num_steps] or [np.empty(0, np.int64)]
        )
        window = 1  # `returns` holds the sum over this many steps; each pass doubles it
        while window < (episodes.num_steps.max() if len(episodes) else 0):
            reaches = np.flatnonzero(remaining > window)
            returns[reaches] = returns[reaches] + discount**window * returns[reaches + window]
            window *= 2
        returns[np.repeat(~episodes.terminated, episodes.num_steps)] = np.nan
        return returns

    def _rows(self, array: str) -> np.ndarray:
        """An array with its whole capacity."""
        return self._columns[array].rows

    @property
    def _seen(self) -> Frames:
        if self._frames is None:
            raise UserError(f"{self.path} is not a replay with images: it has no {FRAMES_NAME}.")
        return self._frames

    @property
    def _num_rows(self) -> int:
        """Rows of observations that count."""
        return self.num_steps + self.num_episodes

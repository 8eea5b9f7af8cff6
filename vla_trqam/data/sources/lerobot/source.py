"""A LeRobotDataset (v3) as RL data: a source of episodes that are decoded once. Actions stay raw.

Its files are read here and not by LeRobot: only what is asked for is opened, after it was checked.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vla_trqam.data.episode import Episode, LazyImages
from vla_trqam.data.frames import STATE_KEY, TASK_KEY, FrameObservation, image_key
from vla_trqam.data.replay_files import ColumnSpec
from vla_trqam.data.sampling import RewardKind
from vla_trqam.data.sources.base import Sizes
from vla_trqam.data.sources.lerobot.columns import further_columns, label_columns
from vla_trqam.data.sources.lerobot.episodes import EpisodeTable
from vla_trqam.data.sources.lerobot.hub import DatasetPlace, find_dataset
from vla_trqam.data.sources.lerobot.labels import (
    FINAL_OBSERVATION,
    FRAME_IS_NEW,
    LABELS,
    REWARD,
    LabelPlan,
    Outcome,
    RewardSource,
    check_rewards,
    plan_labels,
    read_success_labels,
    reward_values,
)
from vla_trqam.data.sources.lerobot.pictures import Pictures
from vla_trqam.data.sources.lerobot.rows import (
    TASK_CHANGES,
    EpisodeRows,
    RowNumbers,
    RowsWanted,
    TaskChanges,
    read_beside,
    read_rows,
)
from vla_trqam.data.sources.lerobot.safety import DatasetFolder, read_info, vector_length
from vla_trqam.data.sources.lerobot.tables import Tasks, read_tasks
from vla_trqam.errors import UserError


@dataclass(frozen=True)
class LeRobotConfig:
    """Which dataset, and what to take from it: the flags `--dataset.*`.

    Attributes:
        repo_id: of the dataset; with `root`, any name.
        root: its local folder; None looks where LeRobot does, and then on the Hub.
        revision: branch, tag or commit on the Hub; None takes the newest v3 tag, as LeRobot does.
        episodes: numbers of those to read; None reads all.
        cameras: to read, without `observation.images.`; None reads all.
        looked_through: a policy's cameras, as renamed; the dataset's others are left unopened.
        reward: where rewards come from; None takes what there is, see `plan_labels`.
        reward_column: the column that rewards are read from; None for `next.reward`.
        reward_file: a Parquet file of the dataset's folder that has it; None for the tables.
        kind: what the critic will make of the rewards, see `RewardSpec`; None does not ask.
        success_labels: a JSON list, one label for each episode of the dataset.
        instruction: column with the policy's instruction; None takes the tasks.
        task_changes: what to do where it changes within an episode: refuse, tell the episode's
            first, or tell each frame's own.
        tolerance_s: seconds that a timestamp may be off its frame's number.
        rename_map: from the dataset's cameras to the policy's, `observation.images.` included.
        columns: further ones to read, of numbers; None takes those that tell of interventions.
        renamed_by: what messages call the `rename_map`.
    """

    repo_id: str
    root: Path | None = None
    revision: str | None = None
    episodes: tuple[int, ...] | None = None
    cameras: tuple[str, ...] | None = None
    looked_through: tuple[str, ...] | None = None
    reward: RewardSource | None = None
    reward_column: str | None = None
    reward_file: str | None = None
    kind: RewardKind | None = None
    success_labels: Path | None = None
    instruction: str | None = None
    task_changes: TaskChanges = "refuse"
    tolerance_s: float = 1e-4
    rename_map: Mapping[str, str] = field(default_factory=dict, hash=False)
    columns: tuple[str, ...] | None = None
    renamed_by: str = "--rename_map"


class LeRobotReader:
    """An opened and checked dataset; all of it but the pictures is in memory.

    Attributes:
        config: what was asked for.
        where: how messages name it.
        revision: the dataset's commit on the Hub; None for a folder that did not come from there.
        plan: what decides about rewards and ends.
        fps: frames per second.
        state_dim: S.
        action_dim: A.
        cameras: name, as renamed -> (height, width, channels).
        columns: further ones: name -> dtype and shape of one row's entry; an episode has none of
            those that only other datasets have.
    """

    def __init__(self, config: LeRobotConfig) -> None:
        """Open the dataset and check that RL can use it; of the pictures, see `check_cameras`.

        Raises:
            UserError: it is missing, damaged, of version 2 or without state, action or rewards; or
                it has not what `config` asks for.
        """
        self.config = config
        self.where = f"The dataset {config.root or config.repo_id}"
        place = find_dataset(config.repo_id, config.root, config.revision)
        self.revision = place.commit
        self._folder = folder = DatasetFolder(place.root)
        self._info = read_info(folder, config.repo_id)
        self.fps = self._info.fps
        table = EpisodeTable(folder, self._info)
        positions = table.chosen(config.episodes)
        self.state_dim = vector_length(self.where, STATE_KEY, self._info.features)
        self.action_dim = vector_length(self.where, "action", self._info.features)
        names = config.rename_map, config.renamed_by
        self._pictures = Pictures(self.where, place, folder, self._info, table, *names)
        self.cameras = self._pictures.shapes(config.cameras, config.looked_through)
        self.columns = further_columns(self.where, self._info.features, config.columns)
        place.fetch(sorted({table.data_file(position) for position in positions}))
        wanted = self._wanted()
        self._rows, self._strangers = read_rows(folder, table, positions, wanted)
        labels = {name for name in LABELS if name in wanted.scalars}
        if config.reward_column is not None:
            labels.add(REWARD)
            self._take_rewards(config.reward_column, place)
        self.plan = self._plan(labels)
        self._shows = True
        self._lacks: list[str] = []
        for rows in self._rows:
            self._check_outcome(rows)

    @property
    def features(self) -> dict[str, Any]:
        """State, action and all cameras by a policy's names, each with `dtype` and `shape`."""
        own, names = self._info.features, self._pictures.names
        keys = {key: key for key in (STATE_KEY, "action")}
        keys |= {image_key(name): key for name, key in names.items()}
        shapes = {image_key(name): shape for name, shape in self.cameras.items()}
        return {
            name: {"dtype": own[key].dtype, "shape": shapes.get(name, own[key].shape)}
            for name, key in keys.items()
        }

    @property
    def sizes(self) -> Sizes:
        """What a replay must be made for."""
        return Sizes(
            observation_dim=self.state_dim,
            action_dim=self.action_dim,
            num_steps=self.num_rows,
            cameras=self.cameras,
            num_frames=self.num_frames,
            tasks_of_rows=self.config.task_changes == "frame",
            columns=self.columns,
        )

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of the state's numbers, where the dataset has any."""
        return self._info.features[STATE_KEY].names

    @property
    def action_names(self) -> tuple[str, ...]:
        """Of the action's numbers, where the dataset has any."""
        return self._info.features["action"].names

    @property
    def num_episodes(self) -> int:
        """Episodes to read."""
        return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Frames to read."""
        return sum(rows.length for rows in self._rows)

    @property
    def num_frames(self) -> int:
        """Rows whose images are their own: what is decoded, at most."""
        return int(sum(_new(rows).sum() for rows in self._rows))

    @property
    def tasks(self) -> list[str]:
        """What the policy is told in these episodes, each text once."""
        whole = self.config.task_changes == "frame"
        told = (text for rows in self._rows for text in (rows.told if whole else rows.told[:1]))
        return sorted(set(told))

    def first_observation(self) -> FrameObservation:
        """What is seen first, in LeRobot's raw format, but for its pictures: they are black."""
        first = self._rows[0]
        seen: FrameObservation = {
            STATE_KEY: torch.from_numpy(first.columns[STATE_KEY][:1].astype(np.float32)),
            TASK_KEY: [first.told[0]],
        }
        for name, (height, width, channels) in self.cameras.items():
            seen[image_key(name)] = torch.zeros(1, channels, height, width)
        return seen

    def row_numbers(self) -> RowNumbers:
        """States and actions of every row to read, by the dataset's own episode numbers."""
        return RowNumbers(
            states=np.concatenate([rows.columns[STATE_KEY] for rows in self._rows]),
            actions=np.concatenate([rows.columns["action"] for rows in self._rows]),
            episodes=np.concatenate([np.full(rows.length, rows.number) for rows in self._rows]),
            frames=np.concatenate([np.arange(rows.length) for rows in self._rows]),
        )

    def with_columns(self, columns: Mapping[str, ColumnSpec]) -> Self:
        """The same dataset with those of others, in which it has zeros, beside its own."""
        reader = copy.copy(self)
        reader.columns = {**columns, **self.columns}
        reader._lacks = sorted(columns.keys() - self.columns.keys())
        return reader

    def without_pictures(self) -> Self:
        """The same dataset, whose episodes say where frames were taken and have none."""
        reader = copy.copy(self)
        reader._shows = False
        return reader

    def frames_of(self, number: int) -> np.ndarray:
        """(F,) rows of an episode that have a frame in the replay, increasing."""
        rows = self._rows[number]
        return np.flatnonzero(_observed(rows, self._outcome(rows)))

    def pictures(self, camera: str, number: int, taken: np.ndarray) -> np.ndarray:
        """Some frames of an episode: its rows (F,), increasing -> (F, H, W, C) uint8.

        Raises:
            UserError: one cannot be decoded.
        """
        shape, tolerance = self.cameras[camera], self.config.tolerance_s
        return self._pictures.decode(camera, shape, self._rows[number], taken, tolerance)

    def part(self, number: int, count: int) -> Self:
        """The same dataset, of whose episodes only every ``count``-th from ``number`` on is read.

        Raises:
            UserError: there are fewer episodes than parts.
        """
        if count > self.num_episodes:
            raise UserError(
                f"{self.where} has {self.num_episodes} episodes for {count} processes; each "
                "needs one at least."
            )
        reader = copy.copy(self)
        reader._rows = self._rows[number::count]
        return reader

    def rewards(self) -> np.ndarray:
        """(N,) stored rewards of all steps."""
        return np.concatenate([self._outcome(rows).rewards for rows in self._rows])

    def check_cameras(self) -> None:
        """Look at the first picture of each video and table, before anything is decoded.

        Raises:
            UserError: a file is missing or damaged, its pictures are not of the declared size, or
                it does not show the episodes that it should.
        """
        for camera, shape in self.cameras.items():
            self._pictures.check(camera, shape, self._rows, self.config.tolerance_s)

    def episodes(self, first: int = 0) -> Iterator[Episode]:
        """Every episode from number `first` on, in order.

        Raises:
            UserError: the frames of one cannot be decoded; see `check_cameras`.
        """
        self.check_cameras()
        for number in range(first, self.num_episodes):
            yield self.episode(number)

    def notes(self) -> list[str]:
        """What it holds and what is assumed of rewards, ends and instructions, a line each."""
        outcomes = [self._outcome(rows) for rows in self._rows]
        successes = sum(outcome.success for outcome in outcomes)
        steps = sum(outcome.num_steps for outcome in outcomes)
        kept = f"{len(outcomes)} episodes, {successes} successful, {steps} steps"
        told = self.plan.notes(self.config.reward_column)
        notes = [f"{kept}; {self.where[0].lower()}{self.where[1:]}", *told]
        if self.config.instruction is not None:
            notes.append(f"instruction: the column {self.config.instruction}")
        if self.config.task_changes == "first":
            notes.append("instruction: each episode's first, where it changes")
        if own := [name for name in self.columns if name not in self._lacks]:
            notes.append(f"further columns: {', '.join(own)}")
        if self._lacks:
            notes.append(f"no column {', '.join(self._lacks)}: zeros, nobody intervened")
        return notes + self._left_out(outcomes)

    def _left_out(self, outcomes: Sequence[Outcome]) -> list[str]:
        """What is in the files and not in the episodes, or in no chunk."""
        notes, ends = [], list(zip(self._rows, outcomes, strict=True))
        late = sum(max(rows.length - outcome.num_steps - 1, 0) for rows, outcome in ends)
        unseen = sum(not (o.terminated or _observed(rows, o)[-1]) for rows, o in ends)
        if self._strangers:
            notes.append(
                f"{self._strangers} rows of episodes that meta/episodes does not list are left out"
            )
        if late:
            notes.append(f"{late} rows after the end of their episode are left out")
        if unseen:
            notes.append(
                f"{unseen} truncated episodes have no observation after their last action; chunks "
                "that reach it are left out"
            )
        return notes

    def episode(self, number: int) -> Episode:
        """Read one; they are counted from 0 in the order of their numbers in the dataset.

        Its pictures are decoded as they are asked for, which raises a UserError where they cannot.
        """
        rows = self._rows[number]
        outcome = self._outcome(rows)
        num_steps = outcome.num_steps
        seen = np.minimum(np.arange(num_steps + 1), rows.length - 1)
        observed = _observed(rows, outcome)
        taken = np.flatnonzero(observed)
        told = tuple(rows.told[row] for row in seen)
        return Episode(
            observations=rows.columns[STATE_KEY].astype(np.float32)[seen],
            images={
                name: self._pictures_of(name, number, taken)
                for name in (self.cameras if self._shows else ())
            },
            observed=observed,
            actions=rows.columns["action"].astype(np.float32)[:num_steps],
            rewards=outcome.rewards,
            terminated=outcome.terminated,
            truncated=not outcome.terminated,
            success=outcome.success,
            task=told if self.config.task_changes == "frame" else told[0],
            columns={
                name: rows.columns[name][:num_steps].astype(dtype)
                for name, (dtype, _) in self.columns.items()
                if name not in self._lacks
            },
        )

    def _pictures_of(self, camera: str, number: int, taken: np.ndarray) -> LazyImages:
        height, width, channels = self.cameras[camera]

        def decode(frames: np.ndarray) -> np.ndarray:
            return self.pictures(camera, number, taken[frames])

        return LazyImages((len(taken), height, width, channels), decode)

    def _take_rewards(self, column: str, place: DatasetPlace) -> None:
        """Of a column of the tables, or of a file beside them."""
        file = self.config.reward_file
        if file is None:
            found = [rows.columns[column] for rows in self._rows]
        else:
            place.fetch([file])
            found = read_beside(self._folder.file(file), column, self._rows)
        for rows, rewards in zip(self._rows, found, strict=True):
            rows.columns[REWARD] = rewards

    def any_true(self, column: str) -> bool:
        """Whether a further column is true, or not 0, in any row to read."""
        return any(
            bool(rows.columns[column].any()) for rows in self._rows if column in rows.columns
        )

    def _outcome(self, rows: EpisodeRows) -> Outcome:
        return self.plan.outcome(rows.columns, rows.position)

    def _check_outcome(self, rows: EpisodeRows) -> None:
        where = f"{rows.file}: episode {rows.number}"
        if rows.length == 1 and rows.columns.get(FINAL_OBSERVATION, np.zeros(1))[0]:
            raise UserError(f"{where} has a final observation and no step before it.")
        if not _new(rows)[0]:
            raise UserError(f"{where}, frame 0 says that its images repeat an earlier frame's.")
        if self.config.kind is not None:
            check_rewards(where, self._outcome(rows), self.plan, self.config.kind)

    def _wanted(self) -> RowsWanted:
        config, features = self.config, self._info.features
        if config.task_changes not in TASK_CHANGES:
            known = ", ".join(TASK_CHANGES)
            raise UserError(
                f"--dataset.task_changes is {config.task_changes!r}; choose one of {known}."
            )
        if not 0 < config.tolerance_s < 0.5 / self.fps:
            raise UserError(
                f"--dataset.tolerance_s={config.tolerance_s:g} must be above 0 and below "
                f"{0.5 / self.fps:g}, half of the time between two frames at {self.fps:g} Hz."
            )
        for name in set(LABELS) & features.keys():
            if features[name].shape not in ((), (1,)):
                raise UserError(
                    f"{self.where} has {list(features[name].shape)} numbers a frame in {name!r}, "
                    "which is read as one."
                )
        labels = label_columns(
            self.where, features, config.reward_column, config.reward_file, config.reward
        )
        return RowsWanted(
            vectors={STATE_KEY: self.state_dim, "action": self.action_dim}
            | {name: shape[0] for name, (_, shape) in self.columns.items() if shape},
            scalars=[name for name in labels if name in features]
            + [name for name, (_, shape) in self.columns.items() if not shape],
            told=self._told(),
            changes=config.task_changes,
            fps=self.fps,
            tolerance=config.tolerance_s,
        )

    def _told(self) -> Tasks | str:
        """Where the instruction is: the column that the user named, or the tasks."""
        column = self.config.instruction
        if column is None:
            return read_tasks(self._folder.file("meta/tasks.parquet"))
        texts = sorted(n for n, f in self._info.features.items() if f.dtype == "string")
        if column not in texts:
            raise UserError(
                f"{self.where} has no column of texts {column!r} for --dataset.instruction; its "
                f"columns of texts are {', '.join(texts) or 'none'}."
            )
        return column

    def _plan(self, columns: Collection[str]) -> LabelPlan:
        config, total = self.config, self._info.total_episodes
        successes = None
        if config.success_labels is not None:
            successes = read_success_labels(config.success_labels)
            if len(successes) != total:
                raise UserError(
                    f"--dataset.success_labels={config.success_labels} has {len(successes)} "
                    f"labels; {self.where} has {total} episodes."
                )
        values = [reward_values(rows.columns) for rows in self._rows] if REWARD in columns else None
        return plan_labels(
            self.where,
            columns,
            reward="column" if config.reward_column and not config.reward else config.reward,
            successes=successes,
            reward_values=None if values is None else np.concatenate(values),
        )


def _new(rows: EpisodeRows) -> np.ndarray:
    """(R,) bool: rows whose images are their own."""
    return rows.columns.get(FRAME_IS_NEW, np.ones(rows.length)).astype(bool)


def _observed(rows: EpisodeRows, outcome: Outcome) -> np.ndarray:
    """(T + 1,) bool: states with images of their own."""
    observed = np.zeros(outcome.num_steps + 1, dtype=bool)
    own = _new(rows)[: len(observed)]
    observed[: len(own)] = own
    return observed

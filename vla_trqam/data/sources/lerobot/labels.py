"""What the columns of a LeRobotDataset say about rewards and ends.

Row t of a column `next.*` tells the outcome of action t. LeRobot's own recorders set `next.done` at
either end of an episode, so that column alone cannot tell termination from a time limit.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vla_trqam.data.sampling import RewardKind
from vla_trqam.errors import UserError

REWARD, DONE, TERMINATED, TRUNCATED, SUCCESS = (
    f"next.{name}" for name in ("reward", "done", "terminated", "truncated", "success")
)
FINAL_OBSERVATION = "is_final_observation"
"""Column of ours, bool: the row shows s_T of a truncated episode; its action was never taken."""
FRAME_IS_NEW = "frame_is_new"
"""Column of ours, bool: False where the images repeat those of an earlier row. (LeRobot takes any
name with "image" in it for a camera's when it checks statistics.)"""

LABELS = (REWARD, DONE, TERMINATED, TRUNCATED, SUCCESS, FINAL_OBSERVATION, FRAME_IS_NEW)
"""Every column that says something about rewards and ends, or about the rows themselves."""

RewardSource = Literal["column", "progress", "success", "terminal_success"]
REWARD_SOURCES: dict[RewardSource, str] = {
    "column": "the column next.reward",
    "progress": "what the column --dataset.reward_column rises by in a step",
    "success": "1 on the step that succeeds, 0 on every other, from success labels",
    "terminal_success": "1 on the last step of every episode: all of them are taken as successes",
}
_EndsFrom = Literal["terminated", "truncated", "success", "nothing"]


@dataclass(frozen=True)
class Outcome:
    """How an episode of R rows went.

    Attributes:
        num_steps: T <= R, rows that are steps. Where T < R, row T shows s_T.
        rewards: (T,) float32.
        terminated: the task ended the episode after step T.
        success: the task was solved.
    """

    num_steps: int
    rewards: np.ndarray
    terminated: bool
    success: bool


@dataclass(frozen=True)
class LabelPlan:
    """Which columns of one dataset decide about rewards, ends and success.

    Attributes:
        reward: where rewards come from.
        ends: what tells a terminated episode from a truncated one.
        successes: one label an episode, where the user gave them.
        reward_success: the reward of a step that succeeds, where only rewards tell of success.
    """

    reward: RewardSource
    ends: _EndsFrom
    columns: frozenset[str]
    successes: tuple[bool, ...] | None = None
    reward_success: float | None = None

    def outcome(self, rows: Mapping[str, np.ndarray], episode: int) -> Outcome:
        """Read one episode.

        Args:
            rows: column -> (R,), at least those of `columns`.
            episode: its number, for the labels.
        """
        num_rows = len(rows["frame_index"])
        if FINAL_OBSERVATION in self.columns and rows[FINAL_OBSERVATION][-1]:
            num_rows -= 1
        num_steps = self._first_end(rows, episode, num_rows)
        success = self._success(rows, episode, num_steps)
        terminated = self._terminated(rows, num_steps, success)
        if self.reward == "column":
            rewards = rows[REWARD][:num_steps].astype(np.float32)
        elif self.reward == "progress":
            rewards = _rises(rows[REWARD], num_steps, solved=success and terminated)
        else:
            rewards = np.zeros(num_steps, np.float32)
            rewards[-1] = success
        return Outcome(num_steps, rewards, terminated, success)

    def notes(self, reward_column: str | None = None) -> list[str]:
        """What is assumed, a line each, for the recipe to print once.

        Args:
            reward_column: the one that stands for `next.reward`, if another does.
        """
        told = REWARD_SOURCES[self.reward]
        if reward_column is not None:
            rises = " rises by in a step, up to 1 where it succeeds"
            of = f"the column {reward_column}"
            told = f"what {of}{rises}" if self.reward == "progress" else of
        ends = {
            "terminated": f"an episode is terminated where {TERMINATED} says so, else truncated",
            "truncated": f"an episode is truncated where {TRUNCATED} says so, else terminated",
            "success": "nothing tells termination from a time limit "
            f"({DONE} is set at both), so an episode is taken as terminated where it succeeds, "
            "else as truncated",
            "nothing": "nothing tells how episodes end, so all are taken as truncated: their last "
            "steps bootstrap",
        }
        notes = [f"reward: {told}", f"ends: {ends[self.ends]}"]
        if self.reward_success is not None:
            notes.append(f"success: nothing labels it, so it is the reward {self.reward_success:g}")
        return notes

    def _first_end(self, rows: Mapping[str, np.ndarray], episode: int, num_rows: int) -> int:
        """T: up to the first row at which the episode ends."""
        for name in (TERMINATED, DONE):
            if name in self.columns and rows[name][:num_rows].any():
                return int(rows[name][:num_rows].argmax()) + 1
        if self.ends == "success":
            succeeds = self._succeeding_rows(rows, num_rows)
            if succeeds is not None and succeeds.any():
                return int(succeeds.argmax()) + 1
        return num_rows

    def _success(self, rows: Mapping[str, np.ndarray], episode: int, num_steps: int) -> bool:
        if self.successes is not None:
            return self.successes[episode]
        if self.reward == "terminal_success":
            return True
        succeeds = self._succeeding_rows(rows, num_steps)
        return succeeds is not None and bool(succeeds.any())

    def _succeeding_rows(self, rows: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray | None:
        """(num_rows,) bool; None where nothing tells single rows."""
        if self.successes is not None or self.reward == "terminal_success":
            return None
        if SUCCESS in self.columns:
            return rows[SUCCESS][:num_rows].astype(bool)
        if self.reward_success is not None:
            return rows[REWARD][:num_rows] == self.reward_success
        return None

    def _terminated(self, rows: Mapping[str, np.ndarray], num_steps: int, success: bool) -> bool:
        if self.ends == "terminated":
            return bool(rows[TERMINATED][num_steps - 1])
        if self.ends == "truncated":
            return not rows[TRUNCATED][num_steps - 1]
        return self.ends == "success" and success


def plan_labels(
    where: str,
    columns: Collection[str],
    *,
    reward: RewardSource | None = None,
    successes: Sequence[bool] | None = None,
    reward_values: np.ndarray | None = None,
) -> LabelPlan:
    """Decide how to read a dataset.

    Args:
        where: the dataset, for messages.
        columns: that it has.
        reward: what the user asked for; None takes the reward column, else success labels.
        successes: one label an episode, given by the user.
        reward_values: of the whole reward column; tell success where they are 0 and 1, or -1 and 0.

    Raises:
        UserError: no reward source, or the one asked for is not there.
    """
    if reward is not None and reward not in REWARD_SOURCES:
        known = ", ".join(REWARD_SOURCES)
        raise UserError(f"--dataset.reward is {reward!r}; choose one of {known}.")
    labelled = successes is not None or SUCCESS in columns
    if reward is None:
        reward = _found_reward(where, columns, labelled=labelled, given=successes is not None)
    if reward == "column" and REWARD not in columns:
        raise UserError(f"{where} has no column {REWARD}, which --dataset.reward=column needs.")
    if reward == "success" and not labelled:
        raise UserError(
            f"{where} has no column {SUCCESS}, which --dataset.reward=success needs: give one "
            "label an episode by --dataset.success_labels."
        )
    told = _reward_of_success(reward_values) if reward == "column" and not labelled else None
    ends: _EndsFrom = "nothing"
    if TERMINATED in columns:
        ends = "terminated"
    elif TRUNCATED in columns:
        ends = "truncated"
    elif labelled or reward == "terminal_success" or told is not None:
        ends = "success"
    given = None if successes is None else tuple(bool(label) for label in successes)
    return LabelPlan(reward, ends, frozenset(columns), given, told)


def read_success_labels(path: Path) -> list[bool]:
    """A JSON list of true and false, one an episode.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        labels = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--dataset.success_labels={path} cannot be read ({error}).") from error
    if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
        raise UserError(
            f"--dataset.success_labels={path} must hold a JSON list of true and false, one an "
            "episode."
        )
    return labels


def reward_values(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The reward column of an episode, without the row that only shows a final observation."""
    if FINAL_OBSERVATION not in rows:
        return rows[REWARD]
    return rows[REWARD][~rows[FINAL_OBSERVATION].astype(bool)]


def _rises(level: np.ndarray, num_steps: int, *, solved: bool) -> np.ndarray:
    """(T,) float32: what a step adds to the level of its row; a solved task has 1.

    They add up to what was gained, so that nothing is earned by staying where the level is high.
    """
    after = np.append(level[1 : num_steps + 1], level[num_steps - 1])[:num_steps]
    if solved:
        after[-1] = 1.0
    return (after - level[:num_steps]).astype(np.float32)


def check_rewards(where: str, outcome: Outcome, plan: LabelPlan, kind: RewardKind) -> None:
    """Refuse rewards from which the critic's cannot be made, before anything is decoded.

    Raises:
        UserError: they are from the reward column, not all 0 or 1, and `kind` wants that.
    """
    strange = np.flatnonzero((outcome.rewards != 0) & (outcome.rewards != 1))
    if plan.reward not in ("column", "progress") or kind == "column" or not strange.size:
        return
    if plan.reward == "progress":
        raise UserError(
            f"--dataset.reward=progress goes with --dataset.kind=column, not {kind}, which is made "
            "from rewards of 0 and 1"
        )
    instead = (
        f"--dataset.reward=success takes them from {SUCCESS}"
        if SUCCESS in plan.columns
        else "--dataset.success_labels=FILE.json takes them from one label an episode"
    )
    raise UserError(
        f"{where}, frame {strange[0]} has the {REWARD} {outcome.rewards[strange[0]]:g}, and "
        f"--dataset.kind={kind} is made from rewards of 0 and 1: {instead}, and "
        "--dataset.kind=column maximises the column as it is."
    )


def _found_reward(
    where: str, columns: Collection[str], *, labelled: bool, given: bool
) -> RewardSource:
    """Labels that the user gave first, then the reward column, then success labels."""
    if given:
        return "success"
    if REWARD in columns:
        return "column"
    if labelled:
        return "success"
    raise UserError(
        f"{where} has no reward: neither {REWARD} nor {SUCCESS} is a column; say "
        "--dataset.reward=terminal_success if every episode ends in success, or give one label an "
        "episode by --dataset.success_labels=FILE.json."
    )


def _reward_of_success(values: np.ndarray | None) -> float | None:
    """1 for rewards of 0 and 1, 0 for rewards of -1 and 0, else None: rewards tell nothing."""
    found = set() if values is None else {float(value) for value in np.unique(values)}
    if 0.0 in found and found <= {0.0, 1.0}:
        return 1.0
    return 0.0 if -1.0 in found and found <= {-1.0, 0.0} else None

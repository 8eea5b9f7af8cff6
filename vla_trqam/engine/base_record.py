"""What a base did before a method moved it: its episodes, and the outcomes of its evaluations.

They depend on no method. A run of a base alone writes them, and each run that begins with it
(``--base_run``) reads them instead of playing the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.errors import UserError
from vla_trqam.files import written_durably
from vla_trqam.report.evaluation import Outcome

RECORD_NAME = "base_record"
EPISODES, OUTCOMES = "episodes", "outcomes.json"
ROLLED_OUT, EVALUATED = "rolled_out", "evaluated"
SOURCE = "base"


@dataclass(frozen=True)
class BaseRecord:
    """Of a base on states.

    Attributes:
        folder: where it lies.
    """

    folder: Path

    @classmethod
    def of_run(cls, output_dir: Path) -> BaseRecord | None:
        """The run's; None where it has none."""
        folder = output_dir / RECORD_NAME
        return cls(folder) if (folder / OUTCOMES).is_file() else None

    def episodes(self, seeds: Sequence[int]) -> list[Episode]:
        """Those that the base rolled out for the replay.

        Raises:
            UserError: it rolled out others.
        """
        known: list[int] = self._read()[ROLLED_OUT]
        if list(seeds) != known:
            raise UserError(
                f"{self.folder} has the base's episodes of {_range(known)}, the run asks for those "
                f"of {_range(seeds)}"
            )
        return _read_episodes(self.folder / EPISODES, known) if known else []

    def outcomes(self, seeds: Sequence[int], num_flow_steps: int) -> list[Outcome]:
        """Of the base's evaluation.

        Args:
            seeds: of the initial states.
            num_flow_steps: that it acted with.

        Raises:
            UserError: it was not evaluated so.
        """
        rows = {int(row[0]): row for row in self._read()[EVALUATED].get(str(num_flow_steps), [])}
        missing = [seed for seed in seeds if seed not in rows]
        if missing:
            raise UserError(
                f"{self.folder} has no evaluation of the base with {num_flow_steps} flow steps on "
                f"the initial state {missing[0]}"
            )
        return [Outcome(*rows[seed]) for seed in seeds]

    def _read(self) -> dict[str, Any]:
        path = self.folder / OUTCOMES
        try:
            content = json.loads(path.read_text())
            return {name: content[name] for name in (ROLLED_OUT, EVALUATED)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def write_record(
    output_dir: Path, episodes: Sequence[Episode], evaluated: Mapping[int, Sequence[Outcome]]
) -> None:
    """Keeps what a base did in the run's folder.

    Args:
        output_dir: the run's folder.
        episodes: rolled out for the replay, in the order of their seeds' list.
        evaluated: outcomes by the number of flow steps.
    """
    with written_durably(output_dir / RECORD_NAME) as part:
        part.mkdir()
        if episodes:
            _write_episodes(part / EPISODES, episodes)
        content = {
            ROLLED_OUT: [episode.seed for episode in episodes],
            EVALUATED: {str(k): [astuple(o) for o in found] for k, found in evaluated.items()},
            "columns": list(asdict(Outcome(0, False, 0))),
        }
        (part / OUTCOMES).write_text(json.dumps(content) + "\n")


def _write_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    replay = Replay.create(
        path,
        observation_dim=episodes[0].observations.shape[1],
        action_dim=episodes[0].actions.shape[1],
        capacity=sum(episode.num_steps for episode in episodes),
    )
    for episode in episodes:
        replay.add(episode, source=SOURCE)
    replay.close()


def _read_episodes(path: Path, seeds: Sequence[int]) -> list[Episode]:
    replay = Replay.open(path)
    table = replay.episodes()
    found = []
    for number, seed in enumerate(seeds):
        length = int(table.num_steps[number])
        row, step = int(table.first_observation[number]), int(table.first_step[number])
        found.append(
            Episode(
                observations=replay.observations[row : row + length + 1],
                actions=replay.actions[step : step + length],
                rewards=replay.rewards[step : step + length],
                terminated=bool(table.terminated[number]),
                truncated=bool(table.truncated[number]),
                success=bool(table.success[number]),
                seed=seed,
            )
        )
    return found


def _range(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} initial states from {seeds[0]}" if seeds else "no initial state"

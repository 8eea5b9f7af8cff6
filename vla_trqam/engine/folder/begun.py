"""What a run that ended before its first checkpoint had read of its data, to be gone on with.

Frames that are decoded and go through a large policy's prefix take hours. A job whose data are so
dear says how far each process's replay is filled; the features of its frames say so themselves
(:class:`~vla_trqam.data.feature_cache.FeatureCache`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vla_trqam.data.replay import Replay
from vla_trqam.engine.folder.run_folder import REPLAY_NAME
from vla_trqam.engine.processes.team import Team
from vla_trqam.errors import UserError
from vla_trqam.files import written_durably

BEGUN_NAME = "begun.json"
"""In a replay's folder."""


@dataclass(frozen=True)
class Begun:
    """How far a process has filled its replay from the run's data.

    Attributes:
        processes: of the run, each with its own part of the data.
        precision: that features are computed in, the launcher's.
        episodes: that lie on the disk itself, whatever ends the machine.
        checked: the run's preflight has passed; what refuses it later may be the machine's fault,
            and what was read is kept.
    """

    processes: int
    precision: str
    episodes: int = 0
    checked: bool = False

    @classmethod
    def of(cls, team: Team, replay: Replay | None = None, *, checked: bool = False) -> Begun:
        """Of this process and what its replay holds; without one, of a replay yet to be filled."""
        episodes = 0 if replay is None else replay.num_episodes
        return cls(team.size, team.precision, episodes, checked)

    def write(self, replay: Path) -> None:
        """Into a replay's folder."""
        with written_durably(replay / BEGUN_NAME) as part:
            part.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, replay: Path) -> Begun | None:
        """Of a replay's folder; None where it cannot be gone on with."""
        try:
            Replay.open(replay)
            return cls(**json.loads((replay / BEGUN_NAME).read_text()))
        except (OSError, ValueError, TypeError, UserError):
            return None


def save_begun(replay: Replay, team: Team, *, checked: bool = False) -> None:
    """What the replay holds now is not lost, whatever ends the run."""
    replay.flush()
    Begun.of(team, replay, checked=checked).write(replay.path)


def begun_replays(output_dir: Path) -> dict[Path, Begun]:
    """By folder, those of a run's replays that can be filled on."""
    found = {path: Begun.read(path) for path in sorted(output_dir.glob(f"{REPLAY_NAME}*"))}
    return {path: begun for path, begun in found.items() if begun is not None}

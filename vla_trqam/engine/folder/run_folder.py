"""The folder of a run: begun anew, or gone on with from its last checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vla_trqam.config.parsing import dump_config
from vla_trqam.config.settings import RunSettings
from vla_trqam.data.replay import Replay
from vla_trqam.engine.folder.checkpoints import Position, last_checkpoint, read_position
from vla_trqam.engine.processes.team import Team
from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import UserError
from vla_trqam.launched import launcher
from vla_trqam.report.metrics import MetricsLog

CONFIG_NAME, BASE_NAME, REPLAY_NAME = "config.yaml", "base_policy", "replay"
COMMAND_NAME = "command.txt"
SET_ASIDE = "before_restart_"
DIVERGED_NAME = "diverged.txt"
"""Why a run ended by numbers that are not finite, where it did."""


def open_folder(
    output_dir: Path,
    *,
    reopen: Callable[[Path], Replay],
    begin: Callable[[Path], Replay],
    team: Team | None = None,
) -> tuple[Replay, MetricsLog | None]:
    """Replay and log of a new run, or those of the run to go on with, back at its checkpoint.

    Every process of the run calls it, within :func:`own_folder`, and gets a replay of its own; the
    main one gets the log.

    Args:
        output_dir: the run's folder.
        reopen: opens the replay at a path.
        begin: makes and fills one there, after whatever else a new run needs; that may be a
            checkpoint of another run, to go on from.
        team: the processes.

    Raises:
        UserError: what is in it is damaged, or the run was begun with another number of processes
            or in another precision.
    """
    team = team or Team()
    path = replay_path(output_dir, team)
    checkpoint = team.together(lambda: last_checkpoint(output_dir))
    if checkpoint is not None:
        return team.together(lambda: _go_on(checkpoint, reopen, path, team))
    replay = team.together(lambda: begin(path))
    taken = team.together(lambda: last_checkpoint(output_dir))
    if taken is not None:
        replay.close()
        return team.together(lambda: _go_on(taken, reopen, path, team))
    return replay, MetricsLog(output_dir / METRICS_NAME) if team.is_main else None


def replay_path(output_dir: Path, team: Team) -> Path:
    """The folder of this process's replay."""
    return output_dir / (f"{REPLAY_NAME}_{team.rank}" if team.rank else REPLAY_NAME)


def _go_on(
    checkpoint: Path, reopen: Callable[[Path], Replay], path: Path, team: Team
) -> tuple[Replay, MetricsLog | None]:
    position = check_launched_alike(checkpoint, team)
    replay = reopen(path)
    replay.truncate_to(position.replay_episodes[team.rank])
    if not team.is_main:
        return replay, None
    print(f"going on from {checkpoint}")
    log = path.with_name(METRICS_NAME)
    return replay, MetricsLog.resume_after_line(log, position.metrics_lines)


def check_launched_alike(checkpoint: Path, team: Team) -> Position:
    """Where a run stood, if these processes can go on with it.

    Raises:
        UserError: they are of another number or precision.
    """
    position = read_position(checkpoint)
    begun = len(position.replay_episodes)
    if begun != team.size:
        raise UserError(
            f"{checkpoint} is of a run of {begun} processes, each with its own part of the data; "
            f"start {begun} instead of {team.size} to go on with it"
        )
    if position.precision != team.precision:
        raise UserError(
            f"{checkpoint} is of a run with mixed_precision {position.precision}, this one is "
            f"launched with {team.precision}: `accelerate launch -q "
            f"--mixed_precision={position.precision}` goes on with it"
        )
    return position


def save_settings(config: RunSettings, output_dir: Path) -> None:
    """Writes the command and ``config.yaml``, with which the run can be resumed from then on.

    The command stays where a run that had no checkpoint yet is resumed, and so begun anew.
    """
    if not config.resume:
        command = shlex.join([*launcher(), *sys.argv])
        (output_dir / COMMAND_NAME).write_text(command + "\n")
    saved = replace(config, resume=False, checkpoint=None)
    dump_config(saved, output_dir / CONFIG_NAME)


def command_of(output_dir: Path) -> str:
    """The command that began the run, which a resumed run's own is not.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (output_dir / COMMAND_NAME).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{output_dir / COMMAND_NAME} cannot be read: {error}") from None

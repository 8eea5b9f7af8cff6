"""Two policies side by side on the same initial states, filmed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_trqam.data.episode import Episode
from vla_trqam.envs.rollout import ChunkPolicy, RolloutPool
from vla_trqam.envs.video import write_side_by_side
from vla_trqam.errors import UserError
from vla_trqam.report.evaluation import PairedEvaluation

FRAME_EVERY = 2
DEFAULT_VIDEOS = 2


@dataclass(frozen=True)
class Player:
    """What acts, where.

    Attributes:
        name: as the video's label has it.
        pool: the simulators.
        policy: what acts.
    """

    name: str
    pool: RolloutPool
    policy: ChunkPolicy


def film(
    base: Player, tuned: Player, evaluation: PairedEvaluation, wanted: int | None, folder: Path
) -> list[Path]:
    """Films both side by side: gained episodes first, then lost, then others.

    Args:
        base: on the left.
        tuned: on the right.
        evaluation: of the two.
        wanted: episodes, at most; None for two where off-screen rendering starts, and else for none
            and a sentence.
        folder: where the videos go; made where it is missing.

    Raises:
        UserError: off-screen rendering does not start, and videos are wanted.
    """
    seeds = _interesting(evaluation)[: DEFAULT_VIDEOS if wanted is None else wanted]
    if not seeds:
        return []
    try:
        pair = [each.pool.record(each.policy, seeds, every=FRAME_EVERY) for each in (base, tuned)]
    except UserError as error:
        if wanted is not None:
            raise
        print(f"no videos: {error}")
        return []
    rate, paths = base.pool.family.control_rate, []
    for before, after in zip(*pair, strict=True):
        path = folder / f"seed_{before.seed}.mp4"
        folder.mkdir(exist_ok=True)
        write_side_by_side(
            path,
            _frames(before),
            _frames(after),
            base_label=_label(base.name, before, rate),
            tuned_label=_label(tuned.name, after, rate),
            fps=rate / FRAME_EVERY,
        )
        paths.append(path)
    return paths


def _interesting(evaluation: PairedEvaluation) -> list[int]:
    first = [int(seed) for seed in (*evaluation.gained, *evaluation.lost)]
    return first + [int(seed) for seed in evaluation.seeds if int(seed) not in first]


def _frames(episode: Episode) -> Any:
    assert episode.frames is not None, "the episode was not filmed"
    return episode.frames


def _label(name: str, episode: Episode, control_rate: float) -> str:
    seconds = len(episode.actions) / control_rate
    return f"{name}: {f'success at {seconds:.1f} s' if episode.success else 'failed'}"

"""The settings of an evaluation of two policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vla_trqam.config.settings import VALIDATION_SEED, EvalConfig, refuse_below
from vla_trqam.envs.registry import EnvConfig
from vla_trqam.errors import UserError


@dataclass
class EvaluateConfig:
    """Every setting of evaluate.py.

    Attributes:
        a: folder of a run, whose last checkpoint it is, of a checkpoint, or of a policy.
        b: what it is compared with, likewise; null for the base of ``a``'s run.
        record: folder of a LeRobotDataset to be made of the episodes that ``a`` plays, with its
            rewards, ends and successes; null makes none. It wants other initial states than those
            that the run is evaluated on.
        output_dir: where the result goes; null for a new folder named after the time.
        episodes: initial states; null for as many as the run has.
        first_seed: of the initial states; null for the run's.
        max_episode_steps: control steps until an episode is cut; null for the run's.
        videos: episodes filmed; null for two where off-screen rendering works, else none.
        device: where the policies are; null takes the launcher's.
        num_workers: simulator processes; null for as many as the run has, or one a core.
        num_threads: torch's threads; null for the run's, or one a core.
        env: the simulator; without a type, that of the run.
    """

    a: Path | None = None
    b: Path | None = None
    record: Path | None = None
    output_dir: Path | None = None
    episodes: int | None = None
    first_seed: int | None = None
    max_episode_steps: int | None = None
    videos: int | None = None
    device: str | None = None
    num_workers: int | None = None
    num_threads: int | None = None
    env: EnvConfig = field(default_factory=EnvConfig)

    def __post_init__(self) -> None:
        at_least_one = ("episodes", "max_episode_steps", "num_workers", "num_threads")
        refuse_below({name: getattr(self, name) for name in at_least_one}, 1)
        refuse_below({name: getattr(self, name) for name in ("first_seed", "videos")}, 0)

        if self.env.type is None and self.env != EnvConfig():
            raise UserError("--env.task and the like are of a simulator: add --env.type")

    def seeds(self, run: EvalConfig) -> list[int]:
        """Of the initial states.

        Args:
            run: what is taken where nothing else is asked for.

        Raises:
            UserError: they would be those of the evaluations in training.
        """
        first = run.first_seed if self.first_seed is None else self.first_seed
        count = self.episodes or run.episodes
        if first + count > VALIDATION_SEED:
            raise UserError(
                f"--first_seed={first} must leave its {count} initial states below "
                f"{VALIDATION_SEED}: what comes after is met in training"
            )
        return list(range(first, first + count))

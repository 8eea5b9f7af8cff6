"""What one kind of run brings to the engine: its policy, its data and its simulator.

The engine (:mod:`vla_trqam.engine.finetune`) knows no more of a run than this: how its replay is
begun, what batches hold, how the method is made, and who is compared in the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from vla_trqam.config.settings import RunSettings
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.processes.team import Team
from vla_trqam.engine.run import Phase
from vla_trqam.envs.base import EnvFamily
from vla_trqam.methods.base import OffPolicyMethod
from vla_trqam.policy import FlowPolicy


class Job[C: RunSettings](ABC):
    """A run of one kind, checked as far as it can be before its folder is filled.

    Args:
        config: the settings.
        policy: the policy, as it is given or yet to be pretrained.
        team: the processes of the run.

    Attributes:
        data_sources: names in the replay of what was there before any rollout.
        shorter_chunks: how its user comes by chunks that shorter episodes have room for.
    """

    data_sources: tuple[str, ...] = ("dataset",)
    shorter_chunks: ClassVar[str] = "a policy of shorter chunks"

    def __init__(self, config: C, policy: FlowPolicy, team: Team) -> None:
        self.config, self.policy, self.team = config, policy, team

    @property
    def device(self) -> torch.device:
        """Where the policy is and batches go."""
        return next(self.policy.parameters()).device

    @property
    @abstractmethod
    def title(self) -> str:
        """Of the report."""

    @property
    def valued(self) -> dict[str, Any]:
        """Flags by which the critic's numbers mean something, for who goes on with it."""
        return {"discount": self.config.discount}

    @abstractmethod
    def begin(self, path: Path) -> Replay:
        """A new replay of the data, after whatever else a new run's folder needs."""

    @abstractmethod
    def reopen(self, path: Path) -> Replay:
        """The replay of a run that is gone on with, which may have got more rollouts to come."""

    @abstractmethod
    def take(self, replay: Replay) -> EpisodeStore:
        """The replay that all batches are drawn from; returns where rollouts go."""

    @abstractmethod
    def draw(
        self, sources: Sequence[str] | None = None, *, for_critic: bool = False
    ) -> ChunkSampler[Any]:
        """A sampler of the replay.

        Args:
            sources: names of those drawn from; None for all.
            for_critic: whether the batches are of updates of the critic alone.
        """

    def turn_data(self, done: int) -> None:  # noqa: B027 (few need it)
        """Of data that is not all there at once, brings what is drawn from next.

        It is a function of this number, so that a run that is gone on with draws the same.

        Args:
            done: updates of all phases so far.
        """

    def check(self, everything: ChunkSampler[Any]) -> None:  # noqa: B027 (few need it)
        """What can only be looked at in the replay, and is dear; told or refused.

        Raises:
            UserError: something cannot work.
        """

    @abstractmethod
    def method(self) -> OffPolicyMethod:
        """The method, which is one and the same from the first call on."""

    def renew(self) -> None:  # noqa: B027 (few need it)
        """The run goes back to before the method's first phase: the next one is new."""

    def first_phases(self) -> list[Phase]:
        """What comes before the method's phases."""
        return []

    @abstractmethod
    def family(self) -> EnvFamily | None:
        """The simulators'; None for a run without."""

    def announce(self) -> None:  # noqa: B027 (few need it)
        """What a reader of the terminal should know as training begins."""

    def base(self) -> FlowPolicy | None:
        """A base that is a policy of its own; None where it is the policy's base field."""
        return None

    @abstractmethod
    def save_policy(self, folder: Path) -> None:
        """Writes the policy's part of a checkpoint."""

    def publish(self) -> None:  # noqa: B027 (few need it)
        """Where the finished run goes, by the main process."""

"""Who plays: rollouts that join the replay and evaluations that do not, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np

from vla_trqam.data.episode import Episode
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.base_record import BaseRecord
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.processes.team import Team
from vla_trqam.envs.rollout import ChunkPolicy, RolloutPool
from vla_trqam.methods.base import Actor, FlowActor
from vla_trqam.policy import FlowPolicy
from vla_trqam.report.evaluation import Outcome

ROLLOUT_NOISE, EVALUATION_NOISE = 1, 2


@dataclass(kw_only=True)
class Playing:
    """What it takes to play; every process of the run calls what is here.

    Attributes:
        policy: the policy in training.
        store: where episodes go.
        pool: the simulators; None for a run without rollouts and evaluations.
        team: the processes of the run.
        record: what the policy as it came did, where that is known from another run.
    """

    policy: FlowPolicy
    store: EpisodeStore
    pool: RolloutPool | None
    team: Team = field(default_factory=Team)
    record: BaseRecord | None = None

    def evaluate(self, seeds: Sequence[int], actor: Actor) -> list[Outcome]:
        """One episode an initial state; every actor meets the same states and noise.

        Args:
            seeds: of the initial states.
            actor: what acts.
        """
        return self.evaluate_policy(seeds, self.chunks(actor, EVALUATION_NOISE))

    def evaluate_base(
        self, seeds: Sequence[int], num_flow_steps: int | None = None
    ) -> list[Outcome]:
        """:meth:`evaluate` of the policy as it came, before the first update."""
        actor = FlowActor(self.policy, num_flow_steps=num_flow_steps)
        count = num_flow_steps or self.policy.num_flow_steps
        return self.remembered(seeds, count) or self.evaluate(seeds, actor)

    def remembered(self, seeds: Sequence[int], num_flow_steps: int) -> list[Outcome] | None:
        """Outcomes of the policy as it came, where another run has played them."""
        return None if self.record is None else self.record.outcomes(seeds, num_flow_steps)

    def base_episodes(self, seeds: Sequence[int], source: str | None = None) -> list[Episode]:
        """Rollouts of the policy as it came; those with a source join the replay."""
        record = self.record
        if record is not None:
            return self._played(lambda: record.episodes(seeds), source)
        actor = self.chunks(FlowActor(self.policy), ROLLOUT_NOISE)
        return self._roll_out(actor, seeds, source)

    def evaluate_policy(self, seeds: Sequence[int], policy: ChunkPolicy) -> list[Outcome]:
        """:meth:`evaluate` of what has its noise already."""
        return self._gathered(map(Outcome.of, self._roll_out(policy, seeds)))

    def chunks(self, actor: Actor, noise_seed: int) -> ChunkPolicy:
        """What a rollout asks, in the precision of the run's networks."""
        return chunk_policy(self.policy, actor, noise_seed, self.team.autocast)

    def _roll_out(
        self, actor: ChunkPolicy, seeds: Sequence[int], source: str | None = None
    ) -> list[Episode]:
        """This process's part of the episodes; those with a source join its replay."""
        return self._played(lambda: self.simulator.run(actor, self.team.share(seeds)), source)

    def _played(self, play: Callable[[], list[Episode]], source: str | None) -> list[Episode]:
        def work() -> list[Episode]:
            episodes = play()
            if source is not None:
                for episode in episodes:
                    self.store.add(episode, source=source)
            return episodes

        return self.team.together(work)

    def _gathered(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Those of all processes, in the order of their seeds' list."""
        return [Outcome(*row) for row in self.team.gather_shares([*map(astuple, outcomes)])]

    @property
    def simulator(self) -> RolloutPool:
        """The simulators, of a run that has them."""
        assert self.pool is not None, "a run without a simulator has no rollouts and evaluations"
        return self.pool


def success_rate(outcomes: Sequence[Outcome]) -> float:
    """The share of episodes that succeeded."""
    return float(np.mean([outcome.success for outcome in outcomes]))

"""Who plays: rollouts that join the replay and evaluations that do not, over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def base_episodes(self, seeds: Sequence[int]) -> list[Episode]:
        """Rollouts of the policy as it came."""
        record = self.record
        if record is not None:
            return self.team.together(lambda: record.episodes(seeds))
        return self.roll_out(self.chunks(FlowActor(self.policy), ROLLOUT_NOISE), seeds)

    def evaluate_policy(self, seeds: Sequence[int], policy: ChunkPolicy) -> list[Outcome]:
        """:meth:`evaluate` of what has its noise already."""
        return self.outcomes(self.roll_out(policy, seeds))

    def chunks(self, actor: Actor, noise_seed: int) -> ChunkPolicy:
        """What a rollout asks, in the precision of the run's networks."""
        return chunk_policy(self.policy, actor, noise_seed, self.team.autocast)

    def roll_out(self, actor: ChunkPolicy, seeds: Sequence[int]) -> list[Episode]:
        """This process's part of the episodes."""
        return self.team.together(lambda: self.simulator.run(actor, self.team.share(seeds)))

    def keep(self, episodes: Sequence[Episode], source: str) -> None:
        """This process's episodes join its replay."""

        def add() -> None:
            for episode in episodes:
                self.store.add(episode, source=source)

        self.team.together(add)

    def outcomes(self, episodes: Iterable[Episode]) -> list[Outcome]:
        """Those of all processes, in the order of their seeds' list."""
        own = [astuple(Outcome.of(episode)) for episode in episodes]
        return [Outcome(*row) for row in self.team.gather_shares(own)]

    @property
    def simulator(self) -> RolloutPool:
        """The simulators, of a run that has them."""
        assert self.pool is not None, "a run without a simulator has no rollouts and evaluations"
        return self.pool


def success_rate(outcomes: Sequence[Outcome]) -> float:
    """The share of episodes that succeeded."""
    return float(np.mean([outcome.success for outcome in outcomes]))

"""The phases of a run: what comes first, the critic alone, offline updates, rounds of rollouts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from vla_trqam.data.sampling import ChunkSampler, MixedSampler
from vla_trqam.engine.cached import CriticOnly
from vla_trqam.engine.job import Job
from vla_trqam.engine.run import Phase
from vla_trqam.errors import UserError
from vla_trqam.methods.registry import name_of, requirements_of

CRITIC, OFFLINE, ONLINE = "critic", "offline", "online"


def phases_of(job: Job[Any]) -> list[Phase]:
    """The phases of a run in order, as far as its settings want them.

    Raises:
        UserError: one has nothing to draw.
    """
    phases = _turning_data(job, _wanted(job))
    length = job.policy.executed_length
    for phase in phases:
        if phase.sampler.num_starts == 0:
            raise UserError(
                f"the data for the {phase.name} updates has no chunk of {length} steps; "
                f"choose {job.shorter_chunks} or other --dataset.short_chunks"
            )
    return phases


def _turning_data(job: Job[Any], phases: list[Phase]) -> list[Phase]:
    """The phases, each of which tells the job how many updates there were."""
    before = accumulate((phase.num_steps for phase in phases), initial=0)

    def turn(begin: int, done: int) -> None:
        job.turn_data(begin + done)

    return [
        replace(phase, turn_data=partial(turn, begin))
        for phase, begin in zip(phases, before, strict=False)
    ]


def _wanted(job: Job[Any]) -> list[Phase]:
    config = job.config
    phases = job.first_phases()
    if config.base_alone:
        return phases
    base_seeds = config.base_seeds()  # before the first update of all
    if _warms_up(job):
        phases.append(replace(_warm_up(job), base_episodes=base_seeds))
        base_seeds = ()
    moving = partial(
        Phase,
        make_method=job.method,
        renew=job.renew,
        batch_size=config.batch_size,
        evaluate_every=0 if job.family() is None else config.evaluate_every,
    )
    if config.steps:
        phases.append(
            moving(
                name=OFFLINE,
                num_steps=config.steps,
                sampler=job.draw(),
                base_episodes=base_seeds,
            )
        )
        base_seeds = ()
    if config.online.steps:
        phases.append(
            moving(
                name=ONLINE,
                num_steps=config.online.steps,
                sampler=_online_sampler(job),
                base_episodes=base_seeds,
                episodes_before=config.round_seeds,
            )
        )
    return phases


def _warms_up(job: Job[Any]) -> bool:
    """Whether the critic is learnt alone at first; tells where the method has none."""
    config = job.config
    if config.critic.warmup_steps and not requirements_of(config.method).learns_critic:
        if job.team.is_main:
            print(f"{name_of(config.method)} learns no critic, and there is no warm-up of one")
        return False
    return config.critic.warmup_steps > 0


def _warm_up(job: Job[Any]) -> Phase:
    config = job.config
    return Phase(
        name=CRITIC,
        num_steps=config.critic.warmup_steps,
        make_method=lambda: CriticOnly(job.method()),
        sampler=job.draw(for_critic=True),
        batch_size=config.warmup_batch_size,
        moves_policy=False,
        renew=job.renew,
    )


def _online_sampler(job: Job[Any]) -> ChunkSampler[Any] | MixedSampler[Any]:
    fraction = job.config.online.fraction
    if fraction is None:
        return job.draw()
    share = job.team.fraction_share(fraction, job.config.batch_size)
    offline = job.draw([*job.data_sources, CRITIC, OFFLINE])
    return MixedSampler(offline, job.draw([ONLINE]), online_fraction=share, waits=True)

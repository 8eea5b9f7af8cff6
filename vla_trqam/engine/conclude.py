"""What a run leaves for its reader: the paired evaluation, plots, videos and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.film import Player, film
from vla_trqam.engine.folder.run_folder import command_of
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.engine.run import METRICS_NAME, Run
from vla_trqam.envs.rollout import ChunkPolicy
from vla_trqam.methods.base import FlowActor, OffPolicyMethod, Which
from vla_trqam.policy import FlowPolicy
from vla_trqam.report.critic_check import check_critic
from vla_trqam.report.evaluation import BaseAsItCame, Outcome, PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.page import write_json, write_report
from vla_trqam.report.plots import plot_q_against_returns, plot_run
from vla_trqam.report.success import success_lines

EVALUATION_NAME = "evaluation.json"
BASE: Which = "base"
TUNED: Which = "tuned"


def paired_evaluation(
    base: Sequence[Outcome],
    tuned: Sequence[Outcome],
    as_it_came: tuple[Sequence[Outcome], FlowSteps] | None = None,
) -> PairedEvaluation:
    """Base and tuned episodes from the same initial states.

    Args:
        base: with the tuned policy's number of flow steps.
        tuned: of the tuned policy.
        as_it_came: those of the base with its own number, where that is another, and the numbers.
    """
    outcomes = [base, tuned] if as_it_came is None else [base, tuned, as_it_came[0]]
    seeds = [[e.seed for e in episodes] for episodes in outcomes]
    assert all(each == seeds[0] for each in seeds), "not the same initial states"
    came = None
    if as_it_came is not None:
        episodes, flow_steps = as_it_came
        came = BaseAsItCame(
            np.array([e.success for e in episodes]),
            np.array([e.num_steps for e in episodes]),
            flow_steps,
        )
    return PairedEvaluation(
        seeds=np.array([e.seed for e in base]),
        base_success=np.array([e.success for e in base]),
        tuned_success=np.array([e.success for e in tuned]),
        base_steps=np.array([e.num_steps for e in base]),
        tuned_steps=np.array([e.num_steps for e in tuned]),
        as_it_came=came,
        tasks=tuple(e.task for e in base),
    )


def write_plots(
    run: Run,
    method: OffPolicyMethod,
    evaluation: PairedEvaluation | None,
    sampler: ChunkSampler[Any],
) -> list[Path]:
    """The figures of a run."""
    folder = run.output_dir / "plots"
    paths = plot_run(
        run.output_dir / METRICS_NAME, folder, evaluation=evaluation, kl_unit=method.kl_unit
    )
    check = check_critic(run.policy, method.score, sampler)
    if not check.known.any():
        print("no plot of Q against returns: no whole chunk of the replay has both, finite")
        return paths
    path = folder / "q_against_returns.png"
    plot_q_against_returns(check.q, check.returns, path, success=check.success)
    return [*paths, path]


def conclude(
    run: Run,
    base: FlowPolicy | None,
    method: OffPolicyMethod,
    sampler: ChunkSampler[Any],
    *,
    evaluation_seeds: Sequence[int],
    num_videos: int | None,
    config: Mapping[str, Any],
    title: str,
    seeds: Mapping[str, int],
) -> PairedEvaluation | None:
    """Evaluates, draws, films, writes ``evaluation.json`` and the report, and prints the result.

    Without a simulator it draws and reports only, and returns None. Every process of the run calls
    it: all evaluate, the main one does the rest.

    The base is a policy of its own, or None for the base field of the policy in training. It acts
    with the tuned policy's number of flow steps, and where it came with another, with that too.
    """
    flow_steps = FlowSteps.of(run.policy, base)
    source, which = (run.policy, BASE) if base is None else (base, TUNED)
    own_actor, base_actor = (
        chunk_policy(source, FlowActor(source, which, count), EVALUATION_NOISE, run.team.autocast)
        for count in (flow_steps.own, flow_steps.tuned)
    )
    tuned = run.chunks(method.actor(), EVALUATION_NOISE)
    evaluation = None
    if run.pool is not None:
        evaluation = _evaluate(run, (own_actor, base_actor, tuned), flow_steps, evaluation_seeds)

    def tell() -> None:
        _tell(run, (base_actor, tuned), method, sampler, evaluation, num_videos, facts)

    facts: dict[str, Any] = {"config": config, "title": title, "seeds": seeds}
    facts["kl_unit"] = method.kl_unit
    facts["flow_steps"] = flow_steps
    if run.pool is not None:
        family = run.pool.family
        facts["simulator"] = {"name": family.name, "task": family.task}
    run.team.on_main(tell)
    return evaluation


def _tell(
    run: Run,
    pair: tuple[ChunkPolicy, ChunkPolicy],
    method: OffPolicyMethod,
    sampler: ChunkSampler[Any],
    evaluation: PairedEvaluation | None,
    num_videos: int | None,
    facts: Mapping[str, Any],
) -> None:
    command = command_of(run.output_dir)
    with run.timed("plots"):
        plots = write_plots(run, method, evaluation, sampler)

    def report(videos: Sequence[Path]) -> Path:
        return write_report(
            run.output_dir,
            evaluation=evaluation,
            metrics_path=run.output_dir / METRICS_NAME,
            step=run.step,
            wall_clock=run.wall_clock,
            plots=plots,
            videos=videos,
            command=command,
            **facts,
        )

    path = report(())
    if evaluation is None:
        print(f"\nnot evaluated: the run had no simulator\nreport {path}")
        return
    with run.timed("videos"):
        before, after = (
            Player(name, run.simulator, policy)
            for name, policy in zip((BASE, TUNED), pair, strict=True)
        )
        videos = film(before, after, evaluation, num_videos, run.output_dir / "videos")
    path = report(videos)
    print("\n".join(["", *success_lines(evaluation), f"report {path}"]))


def _evaluate(
    run: Run,
    actors: tuple[ChunkPolicy, ChunkPolicy, ChunkPolicy],
    flow_steps: FlowSteps,
    seeds: Sequence[int],
) -> PairedEvaluation:
    """The final evaluation, written to ``evaluation.json``.

    Args:
        run: whose simulators.
        actors: the base as it came, the base and the tuned policy.
        flow_steps: theirs.
        seeds: of the initial states.
    """
    as_it_came, base_actor, tuned_actor = actors

    def of_base(actor: ChunkPolicy, count: int) -> list[Outcome]:
        return run.remembered(seeds, count) or run.evaluate_policy(seeds, actor)

    with run.timed("final evaluation"):
        own = (of_base(as_it_came, flow_steps.own), flow_steps) if flow_steps.differ else None
        base = of_base(base_actor, flow_steps.tuned)
        evaluation = paired_evaluation(base, run.evaluate_policy(seeds, tuned_actor), own)
    if run.team.is_main:
        write_json(run.output_dir / EVALUATION_NAME, evaluation.to_json())
    return evaluation

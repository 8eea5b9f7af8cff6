"""Two policies that lie in folders, played on the same initial states."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.config.evaluate_settings import EvaluateConfig
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.settings import EvalConfig, RunSettings
from vla_trqam.data.episode import Episode
from vla_trqam.data.frames import image_key
from vla_trqam.data.sources.lerobot.writer import write_episodes
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.conclude import EVALUATION_NAME, paired_evaluation
from vla_trqam.engine.film import Player, film
from vla_trqam.engine.folder.own_folder import own_folder
from vla_trqam.engine.launch import exit_status, own_device, prepare_process, usable_cores
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.registry import make_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError
from vla_trqam.jobs.kinds import kind_of
from vla_trqam.jobs.saved_policies import Contestant, Loading, Place, policy_type
from vla_trqam.methods.base import FlowActor
from vla_trqam.policy import FlowPolicy
from vla_trqam.precision import networks_precision
from vla_trqam.report.evaluation import Outcome, PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.page import write_json
from vla_trqam.report.provenance import command_line, git_commit, package_versions
from vla_trqam.report.success import OF_A_RUN, Names, success_lines

OF_TWO = Names("b", "a", "a - b")
TOLD = ("image_size", "shadows", "instruction", "options")
"""What a run's simulator is told beside its task and cameras."""


def main(presets: Path, arguments: Sequence[str] | None = None) -> int:
    """Command line of the recipe with these presets; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: read_config(presets, given), evaluate)


def read_config(presets: Path, arguments: Sequence[str]) -> EvaluateConfig:
    """The settings, of which ``a`` alone must be given."""
    config = parse_config(EvaluateConfig, presets, arguments)
    if config.a is None:
        raise UserError("--a=FOLDER is missing: the run, checkpoint or policy to be evaluated")
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    config.output_dir = config.output_dir or Path("outputs/evaluate") / stamp
    return config


@dataclass(frozen=True)
class _Match:
    """Who plays against whom."""

    base: Contestant
    tuned: Contestant
    as_it_came: Contestant | None
    flow_steps: FlowSteps | None
    names: Names


def evaluate(config: EvaluateConfig) -> None:
    """Plays, tells, writes ``evaluation.json``, and films.

    Raises:
        UserError: something is missing, or the two do not go together; no folder is left then.
    """
    assert config.a is not None
    assert config.output_dir is not None
    a = Place.find("a", config.a)
    b = None if config.b is None else Place.find("b", config.b)
    home = _home(a, b)
    knobs = EvalConfig() if home is None else home.eval
    threads = None if home is None else home.num_threads
    seeds = config.seeds(knobs)
    with ExitStack() as stack:
        with own_folder(RunSettings(output_dir=config.output_dir)):
            accelerator = prepare_process(config.num_threads or threads)
            family = _family(config, a, b, knobs)
            device = own_device("device", config.device, accelerator)
            lender = a if a.settings is not None else b
            kind = None if lender is None else policy_type(lender.policy)
            loading = Loading(family, device, home, str(accelerator.mixed_precision), kind)
            match = _match(loading, a, b)
            _check_fit(match, family)
            _check_record(config, family, seeds, knobs)
            table = _Table(config, knobs, family, stack)
            print(f"{match.names.tuned}: {match.tuned.what}\n{match.names.base}: {match.base.what}")
            print(f"initial states: {len(seeds)}, in {family.task} of {family.name}")
            evaluation, episodes = _play(table, match, seeds)
            facts = _facts(match, family) | {"command": command_line()}
            write_json(config.output_dir / EVALUATION_NAME, evaluation.to_json() | facts)
        if config.record is not None:
            name, rate = f"local/{config.record.name}", round(family.control_rate)
            write_episodes(episodes, config.record, repo_id=name, fps=rate)
            print(f"{len(episodes)} episodes of {match.names.tuned}: the dataset {config.record}")
        print("\n".join(["", *success_lines(evaluation, match.names)]))
        base = table.player(match.names.base, match.base)
        tuned = table.player(match.names.tuned, match.tuned)
        film(base, tuned, evaluation, config.videos, config.output_dir / "videos")
    print(f"written to {config.output_dir}")


def _home(a: Place, b: Place | None) -> RunSettings | None:
    """Those of the first that belongs to a run, which says what is played."""
    if b is None and a.settings is None:
        raise UserError(f"--a={a.policy} belongs to no run that has a base: name another by --b")
    return a.settings or (None if b is None else b.settings)


def _family(config: EvaluateConfig, a: Place, b: Place | None, knobs: EvalConfig) -> EnvFamily:
    """The simulator of the flags or of the runs, which must be the same."""
    if config.env.type is not None:
        steps = config.max_episode_steps or knobs.max_episode_steps
        return make_family(config.env, max_episode_steps=steps)
    runs = {p.flag: p.settings for p in (a, b) if p is not None and p.settings is not None}
    played = {flag: _family_of_run(config, settings) for flag, settings in runs.items()}
    found = {flag: family for flag, family in played.items() if family is not None}
    if not found:
        raise UserError("no simulator is known, from no run of --a or --b: give --env.type")
    tasks = {flag: (family.name, family.task) for flag, family in found.items()}
    if len(set(tasks.values())) > 1:
        said = [f"--{flag} in {task} of {name}" for flag, (name, task) in tasks.items()]
        raise UserError(f"they were trained in different tasks, {' and '.join(said)}")
    _check_played_alike(config, {flag: runs[flag] for flag in found})
    seen = {kind_of(settings).sees(settings) for settings in runs.values()} - {()}
    if len(seen) > 1:
        said = [f"[{', '.join(each)}]" for each in sorted(seen)]
        raise UserError(f"they see different observations, {' and '.join(said)}")
    return next(iter(found.values()))


def _check_played_alike(config: EvaluateConfig, runs: Mapping[str, RunSettings]) -> None:
    """What the simulator is told besides its task, of which each run may have its own."""
    played = {
        flag: {
            "eval.max_episode_steps": config.max_episode_steps or run.eval.max_episode_steps,
            **{f"env.{name}": getattr(getattr(run, "env", None), name, None) for name in TOLD},
        }
        for flag, run in runs.items()
    }
    first, *others = played.values()
    for name, value in first.items():
        if any(other[name] != value for other in others):
            said = [f"{told[name]} by the run of --{flag}" for flag, told in played.items()]
            how = "--max_episode_steps" if name.startswith("eval.") else "--env.type and the like"
            raise UserError(
                f"they were trained with different --{name}, {' and '.join(said)}: say by {how} "
                "which both are to play"
            )


def _family_of_run(config: EvaluateConfig, settings: RunSettings) -> EnvFamily | None:
    """The run's simulator; None where it had none."""
    steps = config.max_episode_steps or settings.eval.max_episode_steps
    return kind_of(settings).family(settings, steps)


def _match(loading: Loading, a: Place, b: Place | None) -> _Match:
    tuned = loading.contestant(a)
    if b is not None:
        return _Match(loading.contestant(b), tuned, None, None, OF_TWO)
    policy = loading.base_of(a)
    steps = FlowSteps.of(tuned.policy, policy)
    what = f"the base of the run in {a.run}"
    own, same = (
        Contestant(what, policy, FlowActor(policy, "base", count), loading.precision_of(a))
        for count in (steps.own, steps.tuned)
    )
    return _Match(same, tuned, own if steps.differ else None, steps, OF_A_RUN)


def _check_fit(match: _Match, family: EnvFamily) -> None:
    """Both can act in the simulator."""
    sizes = {}
    for name, each in ((match.names.tuned, match.tuned), (match.names.base, match.base)):
        sees, acts = _check_cameras(name, each.policy, family)
        sizes[name] = sees
        for what, has, wants in (
            ("observations", sees, family.state_size),
            ("actions", acts, family.action_size),
        ):
            if wants is not None and has != wants:
                raise UserError(
                    f"{name} has {what} of size {has}, the simulator ({family.name}, "
                    f"{family.task}) of {wants}"
                )
    if len(set(sizes.values())) > 1:
        said = " and ".join(f"{name} of size {size}" for name, size in sizes.items())
        raise UserError(f"they see different observations: {said}")


def _check_cameras(name: str, policy: FlowPolicy, family: EnvFamily) -> tuple[int, int]:
    """The sizes of a policy's states and actions, whose cameras are there."""
    if isinstance(policy, MLPFlowPolicy):
        if family.cameras:
            raise UserError(
                f"{name} acts on states alone, and the simulator shows pictures: only policies of "
                "one kind can be compared"
            )
        return policy.config.observation_dim, policy.config.action_dim
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

    assert isinstance(policy, LeRobotFlowPolicy)
    cameras = policy.cameras([image_key(camera) for camera in family.cameras])
    if not cameras.fit:
        there = ", ".join(sorted(family.cameras)) or "none"
        raise UserError(
            f"{name} looks through {', '.join(cameras.missing)}, and the cameras of the simulator "
            f"are {there}"
        )
    config = policy.host.config
    state = config.robot_state_feature
    return 0 if state is None else state.shape[0], config.action_feature.shape[0]


def _check_record(
    config: EvaluateConfig, family: EnvFamily, seeds: Sequence[int], run: EvalConfig
) -> None:
    """A dataset can be made, of states that no run is judged on."""
    if config.record is None:
        return
    judged = range(run.first_seed, run.first_seed + run.episodes)
    if not set(seeds).isdisjoint(judged):
        raise UserError(
            f"--record would make training data of the initial states {seeds[0]} to {seeds[-1]}, "
            f"of which the run's evaluation has {judged[0]} to {judged[-1]}: what learns from them "
            f"could not be judged on them; give --first_seed={judged.stop} or a later one"
        )
    if config.record.exists():
        raise UserError(f"--record={config.record} exists already: name a folder to be made")
    if not family.cameras:
        raise UserError("--record makes a dataset with pictures, and these policies see states")


class _Table:
    """The simulators, of each chunk length its own, started when they are needed."""

    def __init__(
        self, config: EvaluateConfig, knobs: EvalConfig, family: EnvFamily, stack: ExitStack
    ) -> None:
        self._family, self._stack = family, stack
        self._workers = config.num_workers or knobs.num_workers or usable_cores()
        self._deadline = knobs.chunk_deadline
        self._pools: dict[int, RolloutPool] = {}

    def player(self, name: str, contestant: Contestant) -> Player:
        """A contestant at its place, with the noise of a run's evaluation."""
        policy = contestant.policy
        length = policy.executed_length
        if length not in self._pools:
            pool = RolloutPool(
                self._family,
                chunk_length=length,
                num_workers=self._workers,
                chunk_deadline=self._deadline,
            )
            self._pools[length] = self._stack.enter_context(pool)
        device = next(policy.trainable_parameters()).device
        precision = partial(networks_precision, contestant.precision, device)
        acts = chunk_policy(policy, contestant.actor, EVALUATION_NOISE, precision)
        return Player(name, self._pools[length], acts)


def _play(
    table: _Table, match: _Match, seeds: Sequence[int]
) -> tuple[PairedEvaluation, list[Episode]]:
    """The evaluation, and the episodes of the tuned one."""

    def episodes(contestant: Contestant) -> list[Episode]:
        player = table.player("", contestant)
        return player.pool.run(player.policy, seeds)

    def outcomes(contestant: Contestant) -> list[Outcome]:
        return [Outcome.of(episode) for episode in episodes(contestant)]

    own = None
    if match.as_it_came is not None and match.flow_steps is not None:
        own = (outcomes(match.as_it_came), match.flow_steps)
    base, tuned = outcomes(match.base), episodes(match.tuned)
    return paired_evaluation(base, [Outcome.of(episode) for episode in tuned], own), tuned


def _facts(match: _Match, family: EnvFamily) -> dict[str, Any]:
    """What a reader of the numbers must know beside them."""
    return {
        "policies": {"base": match.base.what, "tuned": match.tuned.what},
        "mixed_precision": {"base": match.base.precision, "tuned": match.tuned.precision},
        "executed_actions": {
            "base": match.base.policy.executed_length,
            "tuned": match.tuned.policy.executed_length,
        },
        "simulator": {
            "name": family.name,
            "task": family.task,
            "max_episode_steps": family.max_episode_steps,
        },
        "commit": git_commit(),
        "versions": package_versions(),
    }

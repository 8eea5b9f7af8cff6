"""The engine: a run from its settings to its report, whatever policy, data, method and simulator.

A recipe is a preset file, settings, and one function from these to a
:class:`~vla_trqam.engine.job.Job`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vla_trqam.config.parsing import given_flags, parse_config, resumed_config, settings_of
from vla_trqam.config.settings import RunSettings, refuse_idle_knobs
from vla_trqam.data.sampling import ChunkSampler
from vla_trqam.engine.alarms import Alarms, q_range, reward_range
from vla_trqam.engine.base_record import BaseRecord, write_record
from vla_trqam.engine.conclude import conclude
from vla_trqam.engine.folder.more_updates import Restart, check_resumed
from vla_trqam.engine.folder.own_folder import begin_again, go_back, own_folder
from vla_trqam.engine.folder.run_folder import CONFIG_NAME, open_folder
from vla_trqam.engine.job import Job
from vla_trqam.engine.launch import prepare_torch, usable_cores
from vla_trqam.engine.phases import phases_of
from vla_trqam.engine.processes.interruption import InterruptGuard
from vla_trqam.engine.processes.team import Team
from vla_trqam.engine.run import Phase, Run
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.methods.base import OffPolicyMethod
from vla_trqam.methods.parts.parallel import check_accelerator
from vla_trqam.methods.registry import requirements_of
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.public_copy import without_paths
from vla_trqam.report.tracker import check_tracker, tracker

type OpenJob[C: RunSettings] = Callable[[C, Accelerator, Team], Job[Any]]


def read_config[C: RunSettings](
    config_class: type[C],
    presets: Path,
    arguments: Sequence[str],
    *,
    restart: Restart,
    preset: str = "default",
) -> C:
    """The settings of a new run, or those of the run that is resumed.

    Args:
        config_class: the recipe's.
        presets: its preset file, which bears the recipe's name.
        arguments: the command line without the program.
        restart: how a new run begins at a checkpoint of this one.
        preset: the preset where none is named.
    """
    config = parse_config(config_class, presets, arguments, preset=preset, begun=CONFIG_NAME)
    if config.resume:
        check = partial(check_resumed, config, restart=restart)
        return resumed_config(config, CONFIG_NAME, arguments, check)
    refuse_idle_knobs(config, given_flags(arguments))
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    config.output_dir = config.output_dir or Path("outputs") / presets.stem / stamp
    return config


def finetune[C: RunSettings](config: C, open_job: OpenJob[C], *, several: bool = False) -> None:
    """The whole run.

    Args:
        config: its settings.
        open_job: loads and checks the policy and the data; refuses here what cannot work, before
            any training.
        several: whether it can work in several processes.

    Raises:
        UserError: the settings, policy, data or folder do not work; no folder is left then, but for
            what was read of dear data where it was the machine's fault.
        Interrupted: it was asked to stop; a checkpoint is saved.
    """
    check_tracker(config.log_with)
    config.method.check_inputs()
    accelerator = prepare_torch(config, several=several)
    team = Team(accelerator if several else None)
    if several:
        team.together(lambda: check_accelerator(accelerator))
    # The folder's name is of the time, and so the main process's.
    config.output_dir = Path(team.on_main(lambda: str(config.output_dir)))
    with own_folder(config, team):
        job = open_job(config, accelerator, team)
        team.on_main(lambda: go_back(config, team))
        _finetune(job)
        team.on_main(job.publish)


def _finetune(job: Job[Any]) -> None:
    config = job.config
    with ExitStack() as stack:
        run, phases, everything = _set_up(job, stack)
        job.team.on_main(lambda: begin_again(config))
        if job.team.is_main:
            job.announce()
            if config.method.notice:
                print(config.method.notice)
        with InterruptGuard(quiet=not job.team.is_main) as guard:
            method = run.train(phases, guard)
        if config.base_alone:
            record_base(run, job)
            return
        assert isinstance(method, OffPolicyMethod)
        base = job.base()
        with method.acting():
            conclude(
                run,
                base,
                method,
                everything,
                evaluation_seeds=config.evaluation_seeds(),
                num_videos=config.eval.videos,
                config=settings_of(config),
                title=job.title,
                seeds={"training": config.seed},
            )


def record_base(run: Run, job: Job[Any]) -> None:
    """Plays what every run with this base begins and ends with, and keeps it."""
    config = job.config
    job.method()  # the policy has the flow steps that training takes
    count, final = run.policy.num_flow_steps, config.evaluation_seeds()
    # As a run plays them, list by list: what is batched together can round otherwise.
    evaluated = {own: run.evaluate_base(final, own) for own in {count, run.policy.own_flow_steps}}
    solved = [outcome.success for outcome in evaluated[count]]
    evaluated[count] = [*evaluated[count], *run.evaluate_base(config.validation_seeds(), count)]
    write_record(run.output_dir, run.base_episodes(config.base_seeds()), evaluated)
    print(
        f"the base alone solves {sum(solved)} of {len(solved)} initial states; runs with "
        f"--base_run={run.output_dir} begin with it"
    )


def _set_up(job: Job[Any], stack: ExitStack) -> tuple[Run, list[Phase], ChunkSampler[Any]]:
    """Folder, replay, phases, a sampler of all data, and last the simulators.

    They start when all else is checked.
    """
    config, team = job.config, job.team
    assert config.output_dir is not None
    replay, metrics = open_folder(config.output_dir, reopen=job.reopen, begin=job.begin, team=team)
    stack.callback(replay.close)
    if metrics is not None:
        _open_log(config, metrics, stack)
    store = job.take(replay)
    everything = job.draw(for_critic=True)
    job.check(everything)
    phases = phases_of(job)
    pool = team.together(lambda: _start_simulators(job))
    run = Run(
        output_dir=config.output_dir,
        policy=job.policy,
        store=store,
        pool=None if pool is None else stack.enter_context(pool),
        generators=team.generators(config.seed, job.device),
        metrics=metrics,
        evaluation_seeds=config.validation_seeds(),
        log_freq=config.log_freq,
        save_freq=config.save_freq,
        device=job.device,
        save_policy=job.save_policy,
        valued=job.valued,
        team=team,
        alarms=Alarms(_q_range(config, everything, team)),
        on_divergence=config.on_divergence,
        step_sizes=config.step_sizes(),
        record=None if config.base_alone else BaseRecord.of_run(config.output_dir),
    )
    return run, phases, everything


def _open_log(config: RunSettings, metrics: MetricsLog, stack: ExitStack) -> None:
    stack.enter_context(metrics)
    if config.log_with is not None:
        assert config.output_dir is not None
        settings = without_paths(settings_of(config))
        metrics.tracker = stack.enter_context(tracker(config.log_with, config.output_dir, settings))


def _start_simulators(job: Job[Any]) -> RolloutPool | None:
    family, knobs = job.family(), job.config.eval
    if family is None:
        return None
    return RolloutPool(
        family,
        chunk_length=job.policy.executed_length,
        num_workers=knobs.num_workers or usable_cores(),
        chunk_deadline=knobs.chunk_deadline,
    )


def _q_range(
    config: RunSettings, everything: ChunkSampler[Any], team: Team
) -> tuple[float, float] | None:
    """What Q can be, by the rewards of all processes; None where it holds more than those."""
    if requirements_of(config.method).soft_values:
        return None
    rolls_out = config.num_training_episodes > 0
    parts = team.gather(list(reward_range(everything, rolls_out=rolls_out)))
    lowest, highest = min(low for low, _ in parts), max(high for _, high in parts)
    return q_range((lowest, highest), config.discount)

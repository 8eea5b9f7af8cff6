"""A run of a flow policy on states, whichever data and simulator: cloning, offline, online, report.

A recipe of states is its preset file, its settings, and one function from these to a `StateTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.config.parsing import given_flags, parse_config, resumed_config, settings_of
from vla_trqam.config.state_settings import StateRunConfig, refuse_idle_flags
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, MixedSampler, RewardSpec
from vla_trqam.engine.alarms import Alarms, q_range, reward_range
from vla_trqam.engine.cached import CriticOnly
from vla_trqam.engine.conclude import conclude
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.folder.checkpoints import PRETRAINED
from vla_trqam.engine.folder.more_updates import check_resumed
from vla_trqam.engine.folder.own_folder import own_folder
from vla_trqam.engine.folder.pins import Source, write_pins
from vla_trqam.engine.folder.run_folder import (
    BASE_NAME,
    CONFIG_NAME,
    begin_states,
    given_policy,
    open_folder,
)
from vla_trqam.engine.launch import make_critic, prepare_torch, usable_cores
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.engine.processes.interruption import InterruptGuard
from vla_trqam.engine.run import Phase, Run
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Method, OffPolicyMethod
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.registry import make_method, name_of
from vla_trqam.report.flow_steps import check_own_steps
from vla_trqam.report.public_copy import without_paths
from vla_trqam.report.tracker import check_tracker, tracker

# Sensors that hardly move would be blown up to unit variance.
SMALLEST_STD = 1e-2


@dataclass(frozen=True)
class StateTask:
    """What a recipe brings: its offline data and its simulator.

    Attributes:
        name: of the task, for the report's title.
        data: the files, to be the same when the run is gone on with.
        observation_dim: O.
        action_dim: A.
        num_steps: of the data.
        moments: mean and standard deviation of the observations, (O,) each.
        fill: puts all of the data into an empty replay; what is to be cloned under the source
            "pretrain", the rest under "dataset".
        family: makes the simulator's family, last of all.
    """

    name: str
    data: Source
    observation_dim: int
    action_dim: int
    num_steps: int
    moments: Callable[[], tuple[np.ndarray, np.ndarray]]
    fill: Callable[[Replay], None]
    family: Callable[[], EnvFamily]

    def capacity(self, config: StateRunConfig) -> int:
        """Steps of the data and of all rollouts of the training."""
        return self.num_steps + config.num_training_episodes * config.eval.max_episode_steps

    def begin(self, config: StateRunConfig, path: Path) -> Replay:
        """A new replay of the data."""
        replay = Replay.create(
            path,
            observation_dim=self.observation_dim,
            action_dim=self.action_dim,
            capacity=self.capacity(config),
        )
        self.fill(replay)
        return replay

    def reopen(self, config: StateRunConfig, path: Path) -> Replay:
        """The replay of a run that is gone on with, which may have got more rollouts to come."""
        replay = Replay.open(path)
        replay.grow(self.capacity(config))
        return replay


def read_config[C: StateRunConfig](
    config_class: type[C], presets: Path, arguments: Sequence[str]
) -> C:
    """The settings of a new run, or those of the run that is resumed.

    Args:
        config_class: the recipe's.
        presets: its preset file, which bears the recipe's name.
        arguments: the command line without the program.
    """
    config = parse_config(config_class, presets, arguments)
    if config.resume:
        check = partial(check_resumed, config, restart=_restart)
        return resumed_config(config, CONFIG_NAME, arguments, check)
    refuse_idle_flags(config, given_flags(arguments))
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    config.output_dir = config.output_dir or Path("outputs") / presets.stem / stamp
    return config


def _restart(_: StateRunConfig, checkpoint: Path) -> list[str]:
    """How a new run begins at a checkpoint's policy; the recipe takes no critic."""
    return [f"--policy.path={checkpoint / PRETRAINED}"]


def finetune[C: StateRunConfig](config: C, open_task: Callable[[C], StateTask]) -> None:
    """The whole run.

    Args:
        config: its settings.
        open_task: reads and checks the data; refuses here what cannot work, before any training.

    Raises:
        UserError: the settings, the data or the folder do not work; no folder is left then.
        Interrupted: it was asked to stop; a checkpoint is saved.
    """
    check_tracker(config.log_with)
    device = prepare_torch(config).device
    with own_folder(config):
        _finetune(config, open_task(config), device)


def _finetune(config: StateRunConfig, task: StateTask, device: torch.device) -> None:
    policy = _make_policy(config, task).to(device)
    check_own_steps(policy, config.policy.tuned_flow_steps, config.method)
    if not config.resume:
        assert config.output_dir is not None
        write_pins(config.output_dir, [task.data])  # of a given policy the run has a copy
    reward = RewardSpec(config.dataset.reward)
    with ExitStack() as stack:
        run, phases, everything = _set_up(config, task, policy, reward, device, stack)
        print(reward.describe())
        print(f"initial states of the final evaluation: {config.eval.episodes}")
        with InterruptGuard() as guard:
            method = run.train(phases, guard)
        assert isinstance(method, OffPolicyMethod)
        base = MLPFlowPolicy.from_pretrained(run.output_dir / BASE_NAME).to(device)
        with method.acting():
            conclude(
                run,
                base,
                method,
                everything,
                evaluation_seeds=config.evaluation_seeds(),
                num_videos=config.eval.videos,
                config=settings_of(config),
                title=f"{name_of(config.method).upper()} on {task.name}",
                seeds={"training": config.seed},
            )


def _set_up(
    config: StateRunConfig,
    task: StateTask,
    policy: MLPFlowPolicy,
    reward: RewardSpec,
    device: torch.device,
    stack: ExitStack,
) -> tuple[Run, list[Phase], ChunkSampler]:
    """Folder, replay, phases, a sampler of all data, and last the simulators.

    They start when all else is checked.
    """
    output_dir = config.output_dir
    assert output_dir is not None
    replay, metrics = open_folder(
        output_dir,
        reopen=partial(task.reopen, config),
        begin=partial(begin_states, config, policy, partial(task.begin, config)),
    )
    stack.callback(replay.close)
    assert metrics is not None, "this is the main process"
    stack.enter_context(metrics)
    if config.log_with is not None:
        settings = without_paths(settings_of(config))
        metrics.tracker = stack.enter_context(tracker(config.log_with, output_dir, settings))
    draw = partial(
        replay.sampler,
        chunk_length=policy.chunk_shape[0],
        discount=config.discount,
        short_chunks=config.dataset.short_chunks,
        reward=reward,
    )
    phases, everything = _phases(config, policy, draw), draw()
    pool = RolloutPool(
        task.family(),
        chunk_length=policy.chunk_shape[0],
        num_workers=config.eval.num_workers or usable_cores(),
        chunk_deadline=config.eval.chunk_deadline,
    )
    run = Run(
        output_dir=output_dir,
        policy=policy,
        store=EpisodeStore(replay),
        pool=stack.enter_context(pool),
        generators=Generators.seeded(config.seed, device),
        metrics=metrics,
        evaluation_seeds=config.validation_seeds(),
        log_freq=config.log_freq,
        save_freq=config.save_freq,
        device=device,
        save_policy=policy.save_pretrained,
        alarms=Alarms(q_range(reward_range(everything, rolls_out=True), config.discount)),
        on_divergence=config.on_divergence,
    )
    return run, phases, everything


def _make_policy(config: StateRunConfig, task: StateTask) -> MLPFlowPolicy:
    given = given_policy(config)
    if given is not None:
        policy = MLPFlowPolicy.from_pretrained(given)
        shapes = policy.config.observation_dim, policy.config.action_dim
        if shapes != (task.observation_dim, task.action_dim):
            raise UserError(
                f"the policy in {given} has observations and actions of sizes "
                f"{shapes}, the data in {task.data.asked} of "
                f"{(task.observation_dim, task.action_dim)}"
            )
        return policy
    mean, std = task.moments()
    shape = MLPFlowConfig(
        observation_dim=task.observation_dim,
        action_dim=task.action_dim,
        chunk_length=config.policy.chunk_length,
        hidden_dims=config.policy.hidden_dims,
        layer_norm=config.policy.layer_norm,
        num_flow_steps=config.policy.num_flow_steps,
    )
    return MLPFlowPolicy(
        shape,
        torch.from_numpy(mean),
        torch.from_numpy(std.clip(min=SMALLEST_STD)),
    )


def _make_method(config: StateRunConfig, policy: MLPFlowPolicy) -> OffPolicyMethod:
    """The method on a pretrained policy, which takes the tuned one's flow steps from here on."""
    if config.policy.tuned_flow_steps is not None:
        policy.take_flow_steps(config.policy.tuned_flow_steps)
    critic = make_critic(config.critic, policy, config.seed)
    return make_method(policy, critic, config.method)


def _phases(
    config: StateRunConfig,
    policy: MLPFlowPolicy,
    draw: Callable[..., ChunkSampler],
) -> list[Phase]:
    """Pretraining, offline and online updates, as far as the settings want them."""
    # The critic's, the offline and the online updates are the same method's.
    method = cache(lambda: _make_method(config, policy))

    def renew() -> None:
        method.cache_clear()
        # As before the method began to train it.
        policy.behaviour = None
        policy.take_flow_steps(policy.own_flow_steps)

    off_policy = partial(
        Phase,
        make_method=method,
        renew=renew,
        batch_size=config.batch_size,
        evaluate_every=config.evaluate_every,
    )
    phases = []
    if config.policy.path is None:
        phases.append(_pretraining(config, policy, draw(sources=["pretrain"])))
    if config.offline.critic_steps:
        phases.append(
            Phase(
                name="critic",
                num_steps=config.offline.critic_steps,
                make_method=lambda: CriticOnly(method()),
                sampler=draw(),
                batch_size=config.batch_size,
                episodes_before=lambda done: () if done else config.base_seeds(),
                moves_policy=False,
                renew=renew,
            )
        )
    if config.offline.steps:
        collected = config.offline.critic_steps > 0
        phases.append(
            off_policy(
                name="offline",
                num_steps=config.offline.steps,
                sampler=draw(),
                episodes_before=lambda done: () if done or collected else config.base_seeds(),
            )
        )
    if config.online.steps:
        phases.append(
            off_policy(
                name="online",
                num_steps=config.online.steps,
                sampler=_online_sampler(config, draw),
                episodes_before=config.round_seeds,
            )
        )
    for phase in phases:
        if phase.sampler.num_starts == 0:
            raise UserError(
                f"the data for the {phase.name} updates has no chunk of {policy.chunk_shape[0]} "
                "steps; choose a shorter --policy.chunk_length or other --dataset.short_chunks"
            )
    return phases


def _pretraining(config: StateRunConfig, policy: MLPFlowPolicy, sampler: ChunkSampler) -> Phase:
    knobs, output_dir = config.pretrain, config.output_dir
    assert output_dir is not None

    def finish(method: Method) -> None:
        assert isinstance(method, BehaviourCloning)
        method.finish()
        policy.reset_base()
        policy.save_pretrained(output_dir / BASE_NAME)

    return Phase(
        name="pretrain",
        num_steps=knobs.steps,
        make_method=lambda: BehaviourCloning(policy, knobs.optimizer, knobs.steps),
        sampler=sampler,
        batch_size=knobs.batch_size,
        finish=finish,
        moves_policy=False,
    )


def _online_sampler(
    config: StateRunConfig, draw: Callable[..., ChunkSampler]
) -> ChunkSampler | MixedSampler:
    fraction = config.online.fraction
    if fraction is None:
        return draw()
    offline = draw(sources=["pretrain", "dataset", "critic", "offline"])
    return MixedSampler(offline, draw(sources=["online"]), online_fraction=fraction)

"""A run of an MLP flow on states: a base cloned from the data or given, and what tunes it.

A recipe of states is its preset file, its settings, and one function from these to a `StateTask`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy, read_shape
from vla_trqam.config.parsing import given_flags, settings_of
from vla_trqam.config.state_settings import StateRunConfig, refuse_idle_flags
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, RewardSpec
from vla_trqam.data.sources.base import Sizes, Source, create_replay, fill
from vla_trqam.data.union import UnionSampler
from vla_trqam.data.window import Shards, Window
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.folder.base_run import base_input, check_base_run, take_base
from vla_trqam.engine.folder.checkpoints import PRETRAINED, last_checkpoint
from vla_trqam.engine.folder.pins import Input, write_pins
from vla_trqam.engine.folder.run_folder import BASE_NAME, SET_ASIDE, save_settings
from vla_trqam.engine.job import Job
from vla_trqam.engine.launch import exit_status, make_critic
from vla_trqam.engine.processes.team import Team
from vla_trqam.engine.run import Phase
from vla_trqam.envs.base import EnvFamily
from vla_trqam.errors import UserError
from vla_trqam.files import set_aside, written_durably
from vla_trqam.jobs.state_pins import take_dataset
from vla_trqam.methods.base import Method, OffPolicyMethod
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.registry import make_method, name_of
from vla_trqam.report.flow_steps import check_own_steps

# Sensors that hardly move would be blown up to unit variance.
SMALLEST_STD = 1e-2
PRETRAIN = "pretrain"
MAKES_A_BASE = (
    *("seed", "base_episodes", "dataset", "env", "kernels", "policy", "pretrain"),
    *("eval.episodes", "eval.first_seed", "eval.max_episode_steps"),
    "eval.episodes_during_training",
)
"""Settings on which a base, its episodes or its evaluation depend."""


@dataclass(frozen=True)
class InTurn:
    """Data of which one file at a time is in memory, instead of all in the replay.

    Attributes:
        shards: the files.
        every: updates until the next one's turn.
    """

    shards: Shards
    every: int


@dataclass(frozen=True)
class StateTask:
    """What a recipe brings: its offline data and its simulator.

    Attributes:
        name: of the task, for the report's title.
        data: the files, to be the same when the run is gone on with.
        parts: the data by the name that it gets in the replay: what is to be cloned is "pretrain",
            the rest "dataset".
        in_turn: instead of "pretrain", data of which one file at a time is drawn from.
        moments: mean and standard deviation of the observations, (O,) each.
        family: makes the simulator's family, last of all.
    """

    name: str
    data: Input
    parts: Mapping[str, Source]
    moments: Callable[[], tuple[np.ndarray, np.ndarray]]
    family: Callable[[], EnvFamily]
    in_turn: InTurn | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Of an observation and of an action."""
        sizes = self._some_sizes
        return sizes.observation_dim, sizes.action_dim

    @property
    def num_steps(self) -> int:
        """Of what the replay is to hold from the beginning."""
        return sum(source.sizes.num_steps for source in self.parts.values())

    @property
    def _some_sizes(self) -> Sizes:
        if self.in_turn is not None:
            return self.in_turn.shards.sizes
        return next(iter(self.parts.values())).sizes


def main[C: StateRunConfig](
    config_class: type[C],
    presets: Path,
    open_task: Callable[[C], StateTask],
    arguments: Sequence[str] | None = None,
) -> int:
    """Command line of a recipe; returns the exit status.

    Args:
        config_class: its settings.
        presets: its preset file, which bears the recipe's name.
        open_task: reads and checks the data.
        arguments: of the command line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(
        lambda: read_config(config_class, presets, given),
        lambda config: finetune(config, open_task),
    )


def read_config[C: StateRunConfig](
    config_class: type[C], presets: Path, arguments: Sequence[str]
) -> C:
    """The settings of a new run, or those of the run that is resumed."""
    config = engine.read_config(config_class, presets, arguments, restart=_restart)
    if not config.resume:
        refuse_idle_flags(config, given_flags(arguments))
    return config


def _restart(config: StateRunConfig, checkpoint: Path) -> list[str]:
    """How a new run begins at a checkpoint's policy; the recipe takes no critic."""
    own = [] if config.base_run is None else ["--base_run=null"]
    return [f"--policy.path={checkpoint / PRETRAINED}", *own]


def finetune[C: StateRunConfig](config: C, open_task: Callable[[C], StateTask]) -> None:
    """The whole run; see :func:`vla_trqam.engine.finetune.finetune`."""

    def open_job(config: C, accelerator: Accelerator, team: Team) -> StateJob:
        if config.resume:
            assert config.output_dir is not None
            take_dataset(config, config.output_dir)
        _check_given_policy(config)
        return StateJob.opened(config, open_task(config), accelerator.device, team)

    engine.finetune(config, open_job)


class StateJob(Job[StateRunConfig]):
    """A run on states."""

    data_sources = (PRETRAIN, "dataset")
    shorter_chunks = "a shorter --policy.chunk_length"
    policy: MLPFlowPolicy

    def __init__(
        self, config: StateRunConfig, task: StateTask, policy: MLPFlowPolicy, team: Team
    ) -> None:
        """Use `opened`."""
        super().__init__(config, policy, team)
        self.task, self.reward = task, RewardSpec(config.dataset.reward)
        self._family = cache(task.family)
        self._method = cache(self._make_method)

    @classmethod
    def opened(
        cls, config: StateRunConfig, task: StateTask, device: torch.device, team: Team
    ) -> StateJob:
        """With a policy that is given, or new for the task.

        Raises:
            UserError: the given policy is not of the task.
        """
        policy = _make_policy(config, task).to(device)
        if not config.resume:
            assert config.output_dir is not None
            # Of a given policy the run has a copy.
            write_pins(config.output_dir, [task.data, *_check_base_run(config, task)])
        return cls(config, task, policy, team)

    @property
    def title(self) -> str:
        """Method and task."""
        return f"{name_of(self.config.method).upper()} on {self.task.name}"

    def begin(self, path: Path) -> Replay:
        """The copy of a given policy, the settings, and a new replay of the data."""
        output_dir = path.parent
        if self.config.policy.path is None:
            # Of a run that lost its checkpoints: this one makes its own.
            set_aside([output_dir / BASE_NAME], output_dir, SET_ASIDE)
        elif not self.config.resume:
            # Before the settings: a run that can be resumed has its copy.
            with written_durably(output_dir / BASE_NAME) as part:
                self.policy.save_pretrained(part)
        save_settings(self.config, output_dir)
        replay = self._empty_replay(path)
        for name, source in self.task.parts.items():
            fill(replay, source, name)
        if self.config.base_run is not None:
            replay.flush()
            checkpoint = last_checkpoint(self.config.base_run)
            assert checkpoint is not None, "it was looked at before the folder was begun"
            take_base(self.config.base_run, checkpoint, output_dir)
            print(f"the base, its episodes and its evaluation are those of {self.config.base_run}")
        return replay

    def _empty_replay(self, path: Path) -> Replay:
        parts = list(self.task.parts.values())
        if parts:
            return create_replay(path, parts, more_steps=self._more_steps)
        observation_dim, action_dim = self.task.sizes  # for rollouts alone
        return Replay.create(
            path,
            observation_dim=observation_dim,
            action_dim=action_dim,
            capacity=max(1, self._more_steps),
        )

    def reopen(self, path: Path) -> Replay:
        """The replay of a run that is gone on with, which may have got more rollouts to come."""
        replay = Replay.open(path)
        replay.grow(self.task.num_steps + self._more_steps)
        return replay

    def take(self, replay: Replay) -> EpisodeStore:
        """The replay that all batches are drawn from, beside what is shown of files in turn."""
        self._replay, in_turn = replay, self.task.in_turn
        self._window = None if in_turn is None else Window(in_turn.shards, PRETRAIN)
        return EpisodeStore(replay)

    def turn_data(self, done: int) -> None:
        """Shows the file whose turn it is."""
        if self._window is not None:
            assert self.task.in_turn is not None
            self._window.turn_to(done // self.task.in_turn.every)

    def draw(
        self, sources: Sequence[str] | None = None, *, for_critic: bool = False
    ) -> ChunkSampler:
        """A sampler of states."""
        shown = self._shown if sources is None or PRETRAIN in sources else None
        if shown is None:
            return self._replay.sampler(**self._chunks, sources=sources)
        others = None if sources is None else [name for name in sources if name != PRETRAIN]
        if others == []:
            return shown
        return UnionSampler([shown, self._replay.sampler(**self._chunks, sources=others)])

    @property
    def _chunks(self) -> dict[str, Any]:
        """What every sampler is asked for."""
        return {
            "chunk_length": self.policy.executed_length,
            "flow_length": self.policy.chunk_shape[0],
            "discount": self.config.discount,
            "short_chunks": self.config.dataset.short_chunks,
            "reward": self.reward,
        }

    @cached_property
    def _shown(self) -> ChunkSampler | None:
        """A sampler of the file whose turn it is: one for all, as its table is large."""
        return None if self._window is None else self._window.sampler(**self._chunks)

    def method(self) -> OffPolicyMethod:
        """The method on a pretrained policy, which takes the tuned flow steps from here on."""
        return self._method()

    def renew(self) -> None:
        """As before the method began to train the policy."""
        self._method.cache_clear()
        self.policy.behaviour = None
        self.policy.take_flow_steps(self.policy.own_flow_steps)

    def first_phases(self) -> list[Phase]:
        """The cloning of the base, where none is given."""
        return [] if self.config.policy.path is not None else [self._pretraining()]

    def family(self) -> EnvFamily:
        """The task's."""
        return self._family()

    def announce(self) -> None:
        """The reward, how much is evaluated in the end, and what is not in the replay."""
        if self.task.in_turn is not None:
            for note in self.task.in_turn.shards.notes():
                print(f"{PRETRAIN}: {note}")
        print(self.reward.describe())
        print(f"initial states of the final evaluation: {self.config.eval.episodes}")

    def base(self) -> MLPFlowPolicy:
        """As it was cloned or given."""
        assert self.config.output_dir is not None
        return MLPFlowPolicy.from_pretrained(self.config.output_dir / BASE_NAME).to(self.device)

    def save_policy(self, folder: Path) -> None:
        """Weights and shape."""
        self.policy.save_pretrained(folder)

    @property
    def _more_steps(self) -> int:
        """Of all rollouts of the training."""
        return self.config.num_training_episodes * self.config.eval.max_episode_steps

    def _make_method(self) -> OffPolicyMethod:
        if self.config.policy.tuned_flow_steps is not None:
            self.policy.take_flow_steps(self.config.policy.tuned_flow_steps)
        critic = make_critic(self.config.critic, self.policy, self.config.seed)
        return make_method(self.policy, critic, self.config.method)

    def _pretraining(self) -> Phase:
        knobs, policy, output_dir = self.config.pretrain, self.policy, self.config.output_dir
        assert output_dir is not None

        def finish(method: Method) -> None:
            assert isinstance(method, BehaviourCloning)
            method.finish()
            policy.reset_base()
            with written_durably(output_dir / BASE_NAME) as part:
                policy.save_pretrained(part)

        return Phase(
            name=PRETRAIN,
            num_steps=knobs.steps,
            make_method=lambda: BehaviourCloning(policy, knobs.optimizer, knobs.steps),
            sampler=self.draw([PRETRAIN]),
            batch_size=knobs.batch_size,
            finish=finish,
            moves_policy=False,
        )


def _make_policy(config: StateRunConfig, task: StateTask) -> MLPFlowPolicy:
    given = _given_policy(config)
    if given is not None:
        policy = MLPFlowPolicy.from_pretrained(given)
        shapes = policy.config.observation_dim, policy.config.action_dim
        if shapes != task.sizes:
            raise UserError(
                f"the policy in {given} has observations and actions of sizes "
                f"{shapes}, the data in {task.data.asked} of {task.sizes}"
            )
        if config.policy.n_action_steps is not None:
            policy.take_executed_length(config.policy.n_action_steps)
        return policy
    mean, std = task.moments()
    shape = MLPFlowConfig(
        observation_dim=task.sizes[0],
        action_dim=task.sizes[1],
        chunk_length=config.policy.chunk_length,
        hidden_dims=config.policy.hidden_dims,
        layer_norm=config.policy.layer_norm,
        num_flow_steps=config.policy.num_flow_steps,
        n_action_steps=config.policy.n_action_steps,
    )
    return MLPFlowPolicy(
        shape,
        torch.from_numpy(mean),
        torch.from_numpy(std.clip(min=SMALLEST_STD)),
    )


def _check_base_run(config: StateRunConfig, task: StateTask) -> list[Input]:
    """What to pin of the run whose base is taken, which is just what this run would make."""
    if config.base_run is None:
        return []
    settings = settings_of(config)
    checkpoint = check_base_run(config.base_run, settings, MAKES_A_BASE, task.data)
    return [base_input(config.base_run, checkpoint)]


def _given_policy(config: StateRunConfig) -> Path | None:
    """The folder of the policy that the run begins with; a resumed run has a copy of its own."""
    if config.policy.path is None or not config.resume:
        return config.policy.path
    assert config.output_dir is not None
    return config.output_dir / BASE_NAME


def _check_given_policy(config: StateRunConfig) -> None:
    """Refuses a given policy that the method cannot train, by its config, before any data is read.

    Raises:
        UserError: why it cannot serve, or its config is not one.
    """
    given = _given_policy(config)
    if given is not None:
        shape = read_shape(given)
        config.check_executed(shape.chunk_length, str(given), shape.n_action_steps)
        check_own_steps(shape.num_flow_steps, config.policy.tuned_flow_steps, config.method)

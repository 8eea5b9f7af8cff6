"""Makes a flow policy better in a Robomimic task: pretraining, offline and online TRQAM, report.

accelerate launch recipes/finetune_robomimic.py
accelerate launch recipes/finetune_robomimic.py --preset=full --dataset.path=can.hdf5
accelerate launch recipes/finetune_robomimic.py --resume=true --output_dir=outputs/...
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

import vla_trqam.data
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.official import download_official
from vla_trqam.data.replay import ReplayBuffer
from vla_trqam.data.robomimic_hdf5 import (
    RobomimicFile,
    load_into_replay,
    read_robomimic,
    require_env_version,
)
from vla_trqam.data.sampling import ChunkSampler, MixedSampler, RewardSpec
from vla_trqam.envs.env_meta import check_env_meta
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.training.checkpoints import (
    Generators,
    check_output_dir,
    last_checkpoint,
    read_position,
)
from vla_trqam.training.config import dump_config, given_flags, parse_config, resumed_config
from vla_trqam.training.finetuning import METRICS_NAME, Phase, Run
from vla_trqam.training.interruption import Interrupted, InterruptGuard, how_to_go_on
from vla_trqam.training.learners import BehaviourCloning, Learner, OffPolicy
from vla_trqam.training.memory import keep_freed_memory
from vla_trqam.training.metrics import MetricsLog
from vla_trqam.training.settings import FinetuneRobomimicConfig, refuse_idle_flags
from vla_trqam.training.showcase import conclude

PRESETS = Path(__file__).with_suffix(".yaml")
PACKED = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")
CONFIG_NAME, BASE_NAME, REPLAY_NAME = "config.yaml", "base_policy", "replay"
# Sensors that hardly move would be blown up to unit variance.
SMALLEST_STD = 1e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = None
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments)
        finetune(config)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}; a smaller step size or budget may hold it", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        folder = None if config is None else config.output_dir
        begun = folder is not None and (folder / CONFIG_NAME).is_file()
        print(how_to_go_on(folder if begun else None, str(stop)), file=sys.stderr)
        return 130
    return 0


def read_config(arguments: Sequence[str]) -> FinetuneRobomimicConfig:
    """The settings of a new run, or those of the run that is resumed."""
    config = parse_config(FinetuneRobomimicConfig, PRESETS, arguments)
    if config.resume:
        return resumed_config(config, CONFIG_NAME, arguments)
    refuse_idle_flags(config, given_flags(arguments))
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    config.output_dir = config.output_dir or Path("outputs/finetune_robomimic") / stamp
    return config


def finetune(config: FinetuneRobomimicConfig) -> None:
    """The whole run.

    Raises:
        UserError: the settings, the data or the folder do not work; no folder is made then.
        Interrupted: it was asked to stop; a checkpoint is saved.
    """
    device = _prepare_torch(config)
    assert config.output_dir is not None
    check_output_dir(config.output_dir, resume=config.resume)
    file = _read_dataset(config)
    policy = _make_policy(config, file).to(device)
    reward = RewardSpec(config.dataset.reward)
    with ExitStack() as stack:
        run, phases = _set_up(config, file, policy, reward, device, stack)
        print(reward.describe())
        print(f"initial states of the final evaluation: {config.eval.episodes}")
        with InterruptGuard() as guard:
            learner = run.train(phases, guard)
        assert isinstance(learner, OffPolicy)
        base = MLPFlowPolicy.from_pretrained(run.output_dir / BASE_NAME).to(device)
        conclude(
            run,
            base,
            learner.method.critic,
            evaluation_seeds=config.evaluation_seeds(),
            num_videos=config.eval.videos,
            discount=config.discount,
            reward=reward,
            config=asdict(config),
            title=f"{config.method.name.upper()} on {file.env_args['env_name']}",
            seeds={"training": config.seed},
            command=shlex.join(["accelerate", "launch", *sys.argv]),
            kl_unit="nats per action" if config.trqam.kl_per_action else "nats per chunk",
        )


def _set_up(
    config: FinetuneRobomimicConfig,
    file: RobomimicFile,
    policy: MLPFlowPolicy,
    reward: RewardSpec,
    device: torch.device,
    stack: ExitStack,
) -> tuple[Run, list[Phase]]:
    """Folder, replay and phases, and last the simulators: they start when all else is checked."""
    output_dir = config.output_dir
    assert output_dir is not None
    try:
        replay, metrics = _open_folder(config, file, policy, output_dir)
        stack.callback(replay.close)
        stack.enter_context(metrics)
        phases = _phases(config, policy, replay, reward)
        pool = RolloutPool(
            file.env_args,
            chunk_length=policy.chunk_shape[0],
            num_workers=config.eval.num_workers or _cores(),
            max_episode_steps=config.eval.max_episode_steps,
            obs_keys=config.dataset.obs_keys,
        )
    except UserError:
        if not config.resume:
            shutil.rmtree(output_dir, ignore_errors=True)
        raise
    run = Run(
        output_dir=output_dir,
        policy=policy,
        replay=replay,
        pool=stack.enter_context(pool),
        generators=Generators.seeded(config.seed, device),
        metrics=metrics,
        evaluation_seeds=config.validation_seeds(),
        log_freq=config.log_freq,
        save_freq=config.save_freq,
        device=device,
    )
    return run, phases


def _prepare_torch(config: FinetuneRobomimicConfig) -> torch.device:
    accelerator = Accelerator()
    if accelerator.num_processes != 1:
        raise UserError(
            f"accelerate started {accelerator.num_processes} processes; this recipe trains a small "
            "network in one: add --num_processes=1"
        )
    # accelerate launch sets OMP_NUM_THREADS to 1 on its own; this is the owner of the number.
    torch.set_num_threads(config.num_threads or _cores())
    keep_freed_memory()
    torch.manual_seed(config.seed)
    return accelerator.device


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_dataset(config: FinetuneRobomimicConfig) -> RobomimicFile:
    data = config.dataset
    path = download_official(data.name) if data.name else data.path or PACKED
    file = read_robomimic(path, obs_keys=data.obs_keys, filter_key=data.filter_key)
    require_env_version(file)
    try:
        check_env_meta(file.env_args)
        RewardSpec(data.reward).apply(np.concatenate([demo.rewards for demo in file.demos]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return file


def _pretraining_demos(config: FinetuneRobomimicConfig, file: RobomimicFile) -> list[str]:
    """The demos that the base is cloned from; none when it comes from a checkpoint."""
    if config.policy.path is not None:
        return []
    key = config.pretrain.filter_key
    names = [demo.name for demo in file.demos if key is None or key in demo.filter_keys]
    if not names:
        known = sorted({key for demo in file.demos for key in demo.filter_keys})
        raise UserError(
            f"--pretrain.filter_key={key} selects no demo of {file.path}; "
            f"there are {', '.join(known) or 'no filter keys'}"
        )
    count = config.pretrain.num_demos
    if count is not None and count > len(names):
        raise UserError(
            f"--pretrain.num_demos={count} wants more demos than the {len(names)} of {file.path}"
        )
    return names[:count]


def _make_policy(config: FinetuneRobomimicConfig, file: RobomimicFile) -> MLPFlowPolicy:
    _pretraining_demos(config, file)
    if config.policy.path is not None:
        policy = MLPFlowPolicy.from_pretrained(config.policy.path)
        shapes = policy.config.observation_dim, policy.config.action_dim
        if shapes != (file.observation_dim, file.action_dim):
            raise UserError(
                f"the policy in {config.policy.path} has observations and actions of sizes "
                f"{shapes}, the data in {file.path} of {(file.observation_dim, file.action_dim)}"
            )
        return policy
    observations = np.concatenate([demo.observations for demo in file.demos])
    shape = MLPFlowConfig(
        observation_dim=file.observation_dim,
        action_dim=file.action_dim,
        chunk_length=config.policy.chunk_length,
        hidden_dims=config.policy.hidden_dims,
        layer_norm=config.policy.layer_norm,
        num_flow_steps=config.policy.num_flow_steps,
    )
    return MLPFlowPolicy(
        shape,
        torch.from_numpy(observations.mean(axis=0)),
        torch.from_numpy(observations.std(axis=0).clip(min=SMALLEST_STD)),
    )


def _make_method(config: FinetuneRobomimicConfig, policy: MLPFlowPolicy) -> OffPolicy:
    knobs = config.critic
    torch.manual_seed(config.seed)
    horizon, action_dim = policy.chunk_shape
    ensemble = CriticEnsemble(
        policy.feature_dim,
        horizon * action_dim,
        knobs.hidden_dims,
        knobs.ensemble_size,
        layer_norm=knobs.layer_norm,
    )
    critic = Critic(
        ensemble,
        pessimism=knobs.pessimism,
        target_rate=knobs.target_rate,
        clip_actions=knobs.clip_actions,
    ).to(next(policy.parameters()).device)
    return OffPolicy(TRQAM(policy, critic, config.method_config()))


def _open_folder(
    config: FinetuneRobomimicConfig, file: RobomimicFile, policy: MLPFlowPolicy, output_dir: Path
) -> tuple[ReplayBuffer, MetricsLog]:
    """Replay and log of a new run, or those of the run to go on with, back at its checkpoint."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
        position = read_position(checkpoint)
        replay = ReplayBuffer.open(output_dir / REPLAY_NAME)
        replay.truncate_to(position.replay_episodes)
        metrics_path = output_dir / METRICS_NAME
        return replay, MetricsLog.resume_after_line(metrics_path, position.metrics_lines)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir={output_dir} cannot be made: {error.strerror}") from None
    # Nothing to go on with: what a run leaves before its first checkpoint is begun anew.
    (output_dir / METRICS_NAME).unlink(missing_ok=True)
    for name in (REPLAY_NAME, BASE_NAME):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    dump_config(replace(config, resume=False), output_dir / CONFIG_NAME)
    replay = _fill_replay(config, file, output_dir / REPLAY_NAME)
    if config.policy.path is not None:
        policy.save_pretrained(output_dir / BASE_NAME)
    return replay, MetricsLog(output_dir / METRICS_NAME)


def _fill_replay(config: FinetuneRobomimicConfig, file: RobomimicFile, path: Path) -> ReplayBuffer:
    replay = ReplayBuffer.create(
        path,
        observation_dim=file.observation_dim,
        action_dim=file.action_dim,
        capacity=file.num_steps + config.num_training_episodes * config.eval.max_episode_steps,
    )
    cloned = set(_pretraining_demos(config, file))
    parts = {
        "pretrain": [demo.name for demo in file.demos if demo.name in cloned],
        "dataset": [demo.name for demo in file.demos if demo.name not in cloned],
    }
    for source, names in parts.items():
        if names:
            summary = load_into_replay(file.select(names), replay, source=source)
            print(f"{source}: {summary.describe()}")
    return replay


def _phases(
    config: FinetuneRobomimicConfig,
    policy: MLPFlowPolicy,
    replay: ReplayBuffer,
    reward: RewardSpec,
) -> list[Phase]:
    """Pretraining, offline and online updates, as far as the settings want them."""
    draw = partial(
        replay.sampler,
        chunk_length=policy.chunk_shape[0],
        discount=config.discount,
        short_chunks=config.dataset.short_chunks,
        reward=reward,
    )
    # Offline and online updates are the same learner's.
    method = cache(lambda: _make_method(config, policy))
    phases = []
    if config.policy.path is None:
        phases.append(_pretraining(config, policy, draw(sources=["pretrain"])))
    if config.offline.steps:
        phases.append(
            Phase(
                name="offline",
                num_steps=config.offline.steps,
                make_learner=method,
                sampler=draw(),
                batch_size=config.batch_size,
                episodes_before=lambda done: () if done else config.base_seeds(),
                evaluate_every=config.evaluate_every,
            )
        )
    if config.online.steps:
        phases.append(
            Phase(
                name="online",
                num_steps=config.online.steps,
                make_learner=method,
                sampler=_online_sampler(config, draw),
                batch_size=config.batch_size,
                episodes_before=config.round_seeds,
                evaluate_every=config.evaluate_every,
            )
        )
    for phase in phases:
        if phase.sampler.num_starts == 0:
            raise UserError(
                f"the data for the {phase.name} updates has no chunk of {policy.chunk_shape[0]} "
                "steps; choose a shorter --policy.chunk_length or other --dataset.short_chunks"
            )
    return phases


def _pretraining(
    config: FinetuneRobomimicConfig, policy: MLPFlowPolicy, sampler: ChunkSampler
) -> Phase:
    knobs, output_dir = config.pretrain, config.output_dir
    assert output_dir is not None

    def finish(learner: Learner) -> None:
        assert isinstance(learner, BehaviourCloning)
        learner.finish()
        policy.reset_base()
        policy.save_pretrained(output_dir / BASE_NAME)

    return Phase(
        name="pretrain",
        num_steps=knobs.steps,
        make_learner=lambda: BehaviourCloning(policy, knobs.optimizer, knobs.steps),
        sampler=sampler,
        batch_size=knobs.batch_size,
        finish=finish,
    )


def _online_sampler(
    config: FinetuneRobomimicConfig, draw: Callable[..., ChunkSampler]
) -> ChunkSampler | MixedSampler:
    fraction = config.online.fraction
    if fraction is None:
        return draw()
    offline = draw(sources=["pretrain", "dataset", "offline"])
    return MixedSampler(offline, draw(sources=["online"]), online_fraction=fraction)


if __name__ == "__main__":
    sys.exit(main())

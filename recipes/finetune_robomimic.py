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
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
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
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.training.checkpoints import Generators, last_checkpoint, read_position
from vla_trqam.training.config import dump_config, parse_config, saved_config
from vla_trqam.training.finetuning import METRICS_NAME, Phase, Run
from vla_trqam.training.interruption import Interrupted, InterruptGuard
from vla_trqam.training.learners import BehaviourCloning, Learner, OffPolicy
from vla_trqam.training.memory import keep_freed_memory
from vla_trqam.training.metrics import MetricsLog
from vla_trqam.training.settings import (
    TRAINING_SEED,
    TRAINING_SEED_STRIDE,
    VALIDATION_SEED,
    FinetuneRobomimicConfig,
)
from vla_trqam.training.showcase import conclude

PRESETS = Path(__file__).with_suffix(".yaml")
PACKED = Path(vla_trqam.data.__file__).with_name("lift_mixed.hdf5")
CONFIG_NAME, BASE_NAME, REPLAY_NAME = "config.yaml", "base_policy", "replay"
# Sensors that hardly move would be blown up to unit variance.
SMALLEST_STD = 1e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        finetune(read_config(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"stopped{f' at {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    return 0


def read_config(arguments: Sequence[str]) -> FinetuneRobomimicConfig:
    """The settings of a new run, or those of the run that is resumed."""
    config = parse_config(FinetuneRobomimicConfig, PRESETS, arguments)
    if not config.resume:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        config.output_dir = config.output_dir or Path("outputs/finetune_robomimic") / stamp
        return config
    if config.output_dir is None:
        raise UserError("--resume=true needs --output_dir, the folder of the run to go on with")
    allowed = {"--resume", "--output_dir", "--num_threads"}
    others = {a.partition("=")[0] for a in arguments if a.startswith("--")} - allowed
    if others:
        raise UserError(f"a resumed run keeps its settings; leave out {', '.join(sorted(others))}")
    saved = saved_config(FinetuneRobomimicConfig, config.output_dir / CONFIG_NAME)
    saved.resume, saved.output_dir = True, config.output_dir
    saved.num_threads = config.num_threads or saved.num_threads
    return saved


def finetune(config: FinetuneRobomimicConfig) -> None:
    """The whole run.

    Raises:
        UserError: the settings, the data or the folder do not work.
        Interrupted: it was asked to stop; a checkpoint is saved.
    """
    device = _prepare_torch(config)
    assert config.output_dir is not None
    if not config.resume and config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise UserError(
            f"{config.output_dir} is in use; choose another --output_dir, or go on with that run "
            "by --resume=true"
        )
    file = _read_dataset(config)
    policy = _make_policy(config, file).to(device)
    reward = RewardSpec(config.dataset.reward)
    with RolloutPool(
        file.env_args,
        chunk_length=policy.chunk_shape[0],
        num_workers=config.eval.num_workers or _cores(),
        max_episode_steps=config.eval.max_episode_steps,
        obs_keys=config.dataset.obs_keys,
    ) as pool:
        run = _open_run(config, file, policy, pool, device)
        print(reward.describe())
        print(f"initial states of the final evaluation: {config.eval.episodes}")
        method = cache(lambda: _make_method(config, policy))
        with InterruptGuard() as guard:
            learner = run.train(_phases(config, run, reward, method), guard)
        assert isinstance(learner, OffPolicy)
        base = MLPFlowPolicy.from_pretrained(run.output_dir / BASE_NAME).to(device)
        conclude(
            run,
            base,
            learner.method.critic,
            evaluation_seeds=_seeds(config.eval.first_seed, config.eval.episodes),
            num_videos=config.eval.videos,
            discount=config.discount,
            reward=reward,
            config=_plain(config),
            title=f"{config.method.name.upper()} on {file.env_args['env_name']}",
            seeds={"training": config.seed},
            command=_command(),
            kl_unit="nats per action" if config.trqam.kl_per_action else "nats per chunk",
        )


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
    return names[: config.pretrain.num_demos]


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
    trqam = config.trqam
    if config.method.name == "qam":
        trqam = qam_config(trqam, config.method.inverse_temperature)
    return OffPolicy(TRQAM(policy, critic, trqam))


def _open_run(
    config: FinetuneRobomimicConfig,
    file: RobomimicFile,
    policy: MLPFlowPolicy,
    pool: RolloutPool,
    device: torch.device,
) -> Run:
    """A new run's folder, or the folder of the run to go on with."""
    output_dir = config.output_dir
    assert output_dir is not None
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        # Nothing to go on with: what a run leaves before its first checkpoint is begun anew.
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
        dump_config(config, output_dir / CONFIG_NAME)
        replay = _fill_replay(config, file, output_dir / REPLAY_NAME)
        metrics = MetricsLog(output_dir / METRICS_NAME)
        if config.policy.path is not None:
            policy.save_pretrained(output_dir / BASE_NAME)
    else:
        position = read_position(checkpoint)
        replay = ReplayBuffer.open(output_dir / REPLAY_NAME)
        replay.truncate_to(position.replay_episodes)
        metrics = MetricsLog.resume_after_line(output_dir / METRICS_NAME, position.metrics_lines)
    return Run(
        output_dir=output_dir,
        policy=policy,
        replay=replay,
        pool=pool,
        generators=Generators.seeded(config.seed, device),
        metrics=metrics,
        evaluation_seeds=_seeds(VALIDATION_SEED, config.eval.episodes_during_training),
        log_freq=config.log_freq,
        save_freq=config.save_freq,
        device=device,
    )


def _fill_replay(config: FinetuneRobomimicConfig, file: RobomimicFile, path: Path) -> ReplayBuffer:
    rounds = -(-config.online.steps // config.online.updates_per_round)
    episodes = config.offline.base_episodes + rounds * config.online.episodes_per_round
    replay = ReplayBuffer.create(
        path,
        observation_dim=file.observation_dim,
        action_dim=file.action_dim,
        capacity=file.num_steps + episodes * config.eval.max_episode_steps,
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
    config: FinetuneRobomimicConfig, run: Run, reward: RewardSpec, method: object
) -> list[Phase]:
    policy, replay = run.policy, run.replay
    assert isinstance(policy, MLPFlowPolicy)
    assert callable(method)
    make_method = method

    def sampler(*sources: str) -> ChunkSampler:
        return replay.sampler(
            chunk_length=policy.chunk_shape[0],
            discount=config.discount,
            short_chunks=config.dataset.short_chunks,
            reward=reward,
            sources=sources or None,
        )

    def finish_pretraining(learner: Learner) -> None:
        assert isinstance(learner, BehaviourCloning)
        learner.finish()
        policy.reset_base()
        policy.save_pretrained(run.output_dir / BASE_NAME)

    first_seed = TRAINING_SEED + config.seed * TRAINING_SEED_STRIDE

    def base_episodes(done: int) -> Sequence[int]:
        return _seeds(first_seed, config.offline.base_episodes) if done == 0 else ()

    def online_episodes(done: int) -> Sequence[int]:
        number, rest = divmod(done, config.online.updates_per_round)
        count = config.online.episodes_per_round
        start = first_seed + config.offline.base_episodes + number * count
        return () if rest else _seeds(start, count)

    phases = []
    if config.policy.path is None:
        pretrain = config.pretrain
        phases.append(
            Phase(
                name="pretrain",
                num_steps=pretrain.steps,
                make_learner=lambda: BehaviourCloning(policy, pretrain.optimizer, pretrain.steps),
                sampler=sampler("pretrain"),
                batch_size=pretrain.batch_size,
                finish=finish_pretraining,
            )
        )
    if config.offline.steps:
        phases.append(
            Phase(
                name="offline",
                num_steps=config.offline.steps,
                make_learner=make_method,
                sampler=sampler(),
                batch_size=config.batch_size,
                episodes_before=base_episodes,
                evaluate_every=config.evaluate_every,
            )
        )
    if config.online.steps:
        fraction = config.online.fraction
        offline_part = ("pretrain", "dataset", "offline")
        phases.append(
            Phase(
                name="online",
                num_steps=config.online.steps,
                make_learner=make_method,
                sampler=sampler()
                if fraction is None
                else MixedSampler(
                    sampler(*offline_part), sampler("online"), online_fraction=fraction
                ),
                batch_size=config.batch_size,
                episodes_before=online_episodes,
                evaluate_every=config.evaluate_every,
            )
        )
    return phases


def _seeds(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def _plain(config: FinetuneRobomimicConfig) -> dict[str, object]:
    return asdict(config)


def _command() -> str:
    return shlex.join(["accelerate", "launch", *sys.argv])


if __name__ == "__main__":
    sys.exit(main())

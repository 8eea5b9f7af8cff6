"""What the recipes for LeRobot's flow policies share: from settings to a tuned policy and report.

The vision-language prefix is frozen, so each frame goes through it once and its features are kept
beside the replay; an update of the policy evaluates the action expert alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from vla_trqam.adapters.lerobot_policy import PACKED, LeRobotFlowPolicy
from vla_trqam.recipes.vla_inputs import checked_inputs, give_base, push, reward_of
from vla_trqam.recipes.vla_preflight import (
    all_rewards,
    check_data,
    check_machine,
    room_for_rollouts,
)

from vla_trqam.config.parsing import given_flags, parse_config, resumed_config, settings_of
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, MixedSampler
from vla_trqam.data.sources.base import create_replay
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets, source_names
from vla_trqam.engine.alarms import Alarms, q_range, reward_range
from vla_trqam.engine.cached import Cached, CriticOnly
from vla_trqam.engine.conclude import conclude
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.folder.checkpoints import PRETRAINED, last_checkpoint
from vla_trqam.engine.folder.more_updates import check_resumed
from vla_trqam.engine.folder.own_folder import own_folder
from vla_trqam.engine.folder.run_folder import CONFIG_NAME, open_folder, save_settings
from vla_trqam.engine.launch import (
    exit_status,
    make_critic,
    own_device,
    prepare_torch,
    usable_cores,
)
from vla_trqam.engine.next_actions import NextActions, NumberedFeatures
from vla_trqam.engine.processes.interruption import InterruptGuard
from vla_trqam.engine.processes.team import Team
from vla_trqam.engine.run import Phase, Run
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.registry import make_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.hub.pull import find_algorithm, load_algorithm
from vla_trqam.methods.parallel import check_accelerator
from vla_trqam.methods.registry import make_method, name_of
from vla_trqam.report.public_copy import without_paths
from vla_trqam.report.tracker import check_tracker, tracker

CRITIC_FEATURES = (PACKED + "features",)


def main(recipe: Path, packed: Path | None, arguments: Sequence[str] | None = None) -> int:
    """Command line of a recipe; returns the exit status.

    Args:
        recipe: its file, beside which the presets lie.
        packed: folder of the ``policy`` and the ``dataset`` that a run without arguments takes;
            None where there is none.
        arguments: of the command line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(
        lambda: read_config(recipe, packed, given), lambda config: finetune(config, packed)
    )


def read_config(recipe: Path, packed: Path | None, arguments: Sequence[str]) -> FinetuneVLAConfig:
    """The settings of a new run, or those of the run that is resumed.

    The default preset fits the packed policy; one's own gets the preset made for it.
    """
    own = packed is not None and "--policy.path" in given_flags(arguments)
    presets, preset = recipe.with_suffix(".yaml"), "own" if own else "default"
    config = parse_config(FinetuneVLAConfig, presets, arguments, preset=preset)
    if config.resume:
        check = partial(check_resumed, config, restart=partial(_restart, packed))
        return resumed_config(config, CONFIG_NAME, arguments, check)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    config.output_dir = config.output_dir or Path("outputs") / recipe.stem / stamp
    return config


def _restart(packed: Path | None, config: FinetuneVLAConfig, checkpoint: Path) -> list[str]:
    """How a new run begins at a checkpoint's policy and critic."""
    flags = [f"--policy.path={checkpoint / PRETRAINED}", f"--critic.path={checkpoint}"]
    if config.peft.method == "lora" and not config.policy.merged:
        flags.append("--policy.adapter=continue")
    if config.critic.warmup_steps:
        flags.append("--critic.warmup_steps=0")
    if config.dataset.repo_id is None and packed is not None:
        flags += ["--dataset.repo_id=local/packed", f"--dataset.root={packed / 'dataset'}"]
    return flags


def finetune(config: FinetuneVLAConfig, packed: Path | None) -> None:
    """The whole run.

    Raises:
        UserError: the settings, policy, data or folder do not work; no folder is left then.
        Interrupted: it was asked to stop; a checkpoint is saved.
    """
    check_tracker(config.log_with)
    accelerator = prepare_torch(config, several=True)
    team = Team(accelerator)
    team.together(lambda: check_accelerator(accelerator))
    # The folder's name is of the time, and so the main process's.
    config.output_dir = Path(team.on_main(lambda: str(config.output_dir)))
    with own_folder(config, team):
        _finetune(config, packed, accelerator, team)
        if config.policy.push_to_hub:
            team.on_main(lambda: push(config))


def _finetune(
    config: FinetuneVLAConfig, packed: Path | None, accelerator: Accelerator, team: Team
) -> None:
    device = own_device("policy.device", config.policy.device, accelerator)
    family = team.together(lambda: _family(config))
    datasets, policy = team.together(lambda: checked_inputs(config, packed, device, team, family))
    team.together(lambda: check_machine(config, datasets, policy, team))
    with ExitStack() as stack:
        parts = _set_up(config, datasets, policy, accelerator, stack, family)
        run, phases, everything = parts
        with InterruptGuard(quiet=not team.is_main) as guard:
            method = run.train(phases, guard)
        assert isinstance(method, Cached)
        with method.acting():
            conclude(
                run,
                None,
                method,
                everything,
                evaluation_seeds=config.evaluation_seeds(),
                num_videos=config.eval.videos,
                config=settings_of(config),
                title=_title(config, policy, family),
                seeds={"training": config.seed},
            )


def _set_up(
    config: FinetuneVLAConfig,
    datasets: LeRobotDatasets,
    policy: LeRobotFlowPolicy,
    accelerator: Accelerator,
    stack: ExitStack,
    family: EnvFamily | None,
) -> tuple[Run, list[Phase], ChunkSampler[Any]]:
    """Folder, replay, phases, a sampler of all data, and last the simulators.

    They start when all else is checked.
    """
    output_dir = config.output_dir
    assert output_dir is not None
    device, team = next(policy.trainable_parameters()).device, Team(accelerator)
    replay, metrics = open_folder(
        output_dir,
        reopen=partial(_reopen, config, datasets, policy.chunk_shape[0]),
        begin=partial(_begin, config, datasets, team, policy),
        team=team,
    )
    stack.callback(replay.close)
    if metrics is not None:
        stack.enter_context(metrics)
        if config.log_with is not None:
            settings = without_paths(settings_of(config))
            metrics.tracker = stack.enter_context(tracker(config.log_with, output_dir, settings))
    features = FeatureCache(
        replay, lambda seen: _pack(policy, seen), fingerprint=prefix_fingerprint(policy)
    )
    draw = partial(_sampler, config, policy, replay, features)
    everything = draw(None)
    method = cache(lambda: _make_method(config, policy, replay, features, accelerator))
    rewards = all_rewards(replay, everything, team)
    team.together(lambda: check_data(config, policy, replay, everything, rewards, team))
    method()  # what it cannot be made of is refused here
    team.together(features.update)
    phases = _phases(config, draw, method, team)
    pool = team.together(lambda: _start_simulators(config, family, policy))
    run = Run(
        output_dir=output_dir,
        policy=policy,
        store=EpisodeStore(replay, features),
        pool=None if pool is None else stack.enter_context(pool),
        generators=team.generators(config.seed, device),
        metrics=metrics,
        evaluation_seeds=config.validation_seeds(),
        log_freq=config.log_freq,
        save_freq=config.save_freq,
        device=device,
        save_policy=partial(policy.save_pretrained, merged=config.policy.merged),
        team=team,
        alarms=Alarms(_q_range(config, everything, team)),
        on_divergence=config.on_divergence,
    )
    return run, phases, everything


def _begin(
    config: FinetuneVLAConfig,
    datasets: LeRobotDatasets,
    team: Team,
    policy: LeRobotFlowPolicy,
    path: Path,
) -> Replay:
    """The base, where the adapters' is in no file, the settings and the filled replay of a run."""
    chunk_length = policy.chunk_shape[0]
    give_base(config, policy, path.parent, writes=team.is_main)
    if team.is_main:
        save_settings(config, path.parent)
    more_steps, more_frames = room_for_rollouts(config, chunk_length)
    replay = create_replay(
        path, list(datasets.named.values()), more_steps=more_steps, more_frames=more_frames
    )
    datasets.fill(replay, say=print if team.is_main else lambda _: None)
    return replay


def _reopen(
    config: FinetuneVLAConfig, datasets: LeRobotDatasets, chunk_length: int, path: Path
) -> Replay:
    """The replay of a run that is gone on with, which may have got more rollouts to come."""
    more_steps, more_frames = room_for_rollouts(config, chunk_length)
    replay = Replay.open(path)
    replay.grow(datasets.num_rows + more_steps, datasets.num_frames + more_frames)
    return replay


def _q_range(
    config: FinetuneVLAConfig, everything: ChunkSampler[Any], team: Team
) -> tuple[float, float] | None:
    """What Q can be, by the rewards of all processes."""
    rolls_out = config.num_training_episodes > 0
    parts = team.gather(list(reward_range(everything, rolls_out=rolls_out)))
    lowest, highest = min(low for low, _ in parts), max(high for _, high in parts)
    return q_range((lowest, highest), config.discount)


def _pack(policy: LeRobotFlowPolicy, seen: Any) -> dict[str, torch.Tensor]:
    device = next(policy.trainable_parameters()).device
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in seen.items()}
    return policy.packed(moved)


def prefix_fingerprint(policy: LeRobotFlowPolicy) -> str:
    """A hash of everything that the cached features depend on: frozen weights and statistics."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((policy.critic_features, policy.host.config)).encode())
    trained = {id(p) for p in policy.trainable_parameters()}
    tensors = [*policy.host.named_parameters()]
    if policy.processors is not None:
        for feature, entry in sorted(policy.processors.statistics.items()):
            tensors += [(f"{feature}.{name}", value) for name, value in sorted(entry.items())]
    for name, tensor in tensors:
        if id(tensor) not in trained:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _family(config: FinetuneVLAConfig) -> EnvFamily | None:
    if config.env.type is None:
        return None
    return make_family(config.env, max_episode_steps=config.eval.max_episode_steps)


def _start_simulators(
    config: FinetuneVLAConfig, family: EnvFamily | None, policy: LeRobotFlowPolicy
) -> RolloutPool | None:
    if family is None:
        return None
    return RolloutPool(
        family,
        chunk_length=policy.chunk_shape[0],
        num_workers=config.eval.num_workers or usable_cores(),
        chunk_deadline=config.eval.chunk_deadline,
    )


def _sampler(
    config: FinetuneVLAConfig,
    policy: LeRobotFlowPolicy,
    replay: Replay,
    features: FeatureCache,
    names: tuple[str, ...] | None,
    sources: Sequence[str] | None = None,
) -> ChunkSampler[Any]:
    """Chunks whose observations are cached features; ``names`` are those wanted."""
    return replay.sampler(
        chunk_length=policy.chunk_shape[0],
        discount=config.discount,
        short_chunks=config.dataset.short_chunks,
        reward=reward_of(config),
        sources=sources,
        observer=NumberedFeatures(features, replay, names),
    )


def _make_method(
    config: FinetuneVLAConfig,
    policy: LeRobotFlowPolicy,
    replay: Replay,
    features: FeatureCache,
    accelerator: Accelerator,
) -> Cached:
    knobs = config.critic
    critic, team = make_critic(knobs, policy, config.seed), Team(accelerator)
    method = make_method(policy, critic, config.method, accelerator)
    next_actions = None
    if method.requirements.next_actions:
        next_actions = NextActions(
            policy, method.actor(), replay, features, chunks_per_frame=knobs.next_actions
        )
    cached = Cached(
        method,
        next_actions,
        _sampler(config, policy, replay, features, CRITIC_FEATURES),
        critic_updates=knobs.updates_per_step,
        batch_size=team.batch_share(knobs.batch_size),
        redraws=knobs.redraws,
        num_micro_batches=config.micro_batches,
    )
    assert config.output_dir is not None
    if knobs.path is not None and last_checkpoint(config.output_dir) is None:
        critic_path, same_base = knobs.path, config.policy.adapter == "continue"
        team.together(
            lambda: load_algorithm(find_algorithm(critic_path), cached, trust_region=same_base)
        )
    return cached


def _phases(
    config: FinetuneVLAConfig,
    draw: Callable[..., ChunkSampler[Any]],
    method: Callable[[], Cached],
    team: Team,
) -> list[Phase]:
    """The critic's warm-up, offline and online updates, as far as the settings want them."""
    phases = []
    if config.critic.warmup_steps:
        phases.append(
            Phase(
                name="critic",
                num_steps=config.critic.warmup_steps,
                make_method=lambda: CriticOnly(method()),
                sampler=draw(CRITIC_FEATURES),
                batch_size=config.critic.batch_size,
                episodes_before=lambda done: () if done else config.base_seeds(),
                moves_policy=False,
            )
        )
    moving = partial(
        Phase,
        make_method=method,
        batch_size=config.batch_size,
        evaluate_every=config.evaluate_every if config.env.type else 0,
    )
    if config.steps:
        collected = config.critic.warmup_steps > 0
        phases.append(
            moving(
                name="offline",
                num_steps=config.steps,
                sampler=draw(None),
                episodes_before=lambda done: () if done or collected else config.base_seeds(),
            )
        )
    if config.online.steps:
        phases.append(
            moving(
                name="online",
                num_steps=config.online.steps,
                sampler=_online_sampler(config, draw, team),
                episodes_before=config.round_seeds,
            )
        )
    return phases


def _online_sampler(
    config: FinetuneVLAConfig, draw: Callable[..., ChunkSampler[Any]], team: Team
) -> ChunkSampler[Any] | MixedSampler[Any]:
    if config.online.fraction is None:
        return draw(None)
    fraction = team.fraction_share(config.online.fraction, config.batch_size)
    offline = draw(None, [*source_names(1 + len(config.dataset.more)), "critic", "offline"])
    return MixedSampler(offline, draw(None, ["online"]), online_fraction=fraction)


def _title(config: FinetuneVLAConfig, policy: LeRobotFlowPolicy, family: EnvFamily | None) -> str:
    where = f" on {family.task}" if family else ""
    return f"{name_of(config.method).upper()} of {policy.host.config.type}{where}"

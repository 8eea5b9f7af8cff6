"""A run of a LeRobot flow policy: its dataset decoded once, its prefix frozen, its expert tuned.

The vision-language prefix is frozen, so each frame goes through it once and its features are kept
beside the replay; an update of the policy evaluates the action expert alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vla_trqam.adapters.checkpoint.saving import told_of_merging
from vla_trqam.adapters.lerobot_policy import PACKED, LeRobotFlowPolicy
from vla_trqam.config.parsing import given_flags
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.feature_cache import (
    FRAME,
    ComputedFeatures,
    FeatureCache,
    NumberedFeatures,
)
from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, MixedSampler, Observer
from vla_trqam.data.sources.base import create_replay
from vla_trqam.data.sources.lerobot.lending import LentPictures
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets
from vla_trqam.data.transitions import tells_interventions
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.acting import KeyedNoise
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.engine.folder.begun import Begun, save_begun
from vla_trqam.engine.folder.checkpoints import PRETRAINED, last_checkpoint
from vla_trqam.engine.folder.run_folder import save_settings
from vla_trqam.engine.job import Job
from vla_trqam.engine.launch import exit_status, make_critic, own_device, usable_cores
from vla_trqam.engine.next_actions import FIRST_CHUNKS, NextActions
from vla_trqam.engine.phases import CRITIC, OFFLINE, ONLINE
from vla_trqam.engine.processes.team import Team
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.registry import make_family
from vla_trqam.errors import UserError, one_line
from vla_trqam.hub.pull import find_algorithm, load_algorithm
from vla_trqam.jobs.vla_inputs import checked_inputs, critic_sees, give_base, push, reward_of
from vla_trqam.jobs.vla_pins import pin_inputs
from vla_trqam.jobs.vla_preflight import (
    all_rewards,
    check_data,
    check_machine,
    planned_prefixes,
    room_for_rollouts,
)
from vla_trqam.methods.base import OffPolicyMethod
from vla_trqam.methods.parts.off_policy import slices
from vla_trqam.methods.parts.parallel import check_several
from vla_trqam.methods.registry import make_method, name_of, requirements_of
from vla_trqam.preflight.prefixes import FEATURES_ONLY

CRITIC_FEATURES = (PACKED + "features",)
PLACES = ("device", "pretrained_path")
"""Of a policy's config."""
FIRST_CHUNK_NOISE = 4
"""Begins the keys of the noise of frames' first chunks."""


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
    return engine.read_config(
        FinetuneVLAConfig,
        recipe.with_suffix(".yaml"),
        arguments,
        restart=partial(_restart, packed),
        preset="own" if own else "default",
    )


def _restart(packed: Path | None, config: FinetuneVLAConfig, checkpoint: Path) -> list[str]:
    """How a new run begins at a checkpoint's policy and critic."""
    flags = [f"--policy.path={checkpoint / PRETRAINED}"]
    learns_critic = requirements_of(config.method).learns_critic
    if learns_critic:
        flags.append(f"--critic.path={checkpoint}")
    if config.peft.method == "lora" and not config.policy.merged:
        flags.append("--policy.adapter=continue")
    if learns_critic and config.critic.warmup_steps:
        flags.append("--critic.warmup_steps=0")
    if config.dataset.repo_id is None and packed is not None:
        flags += ["--dataset.repo_id=local/packed", f"--dataset.root={packed / 'dataset'}"]
    return flags


def finetune(config: FinetuneVLAConfig, packed: Path | None) -> None:
    """The whole run; see :func:`vla_trqam.engine.finetune.finetune`."""
    engine.finetune(config, partial(VLAJob.opened, packed=packed), several=True)


class VLAJob(Job[FinetuneVLAConfig]):
    """A run of a LeRobot policy."""

    policy: LeRobotFlowPolicy

    def __init__(
        self,
        config: FinetuneVLAConfig,
        policy: LeRobotFlowPolicy,
        datasets: LeRobotDatasets,
        family: EnvFamily | None,
        accelerator: Accelerator,
        team: Team,
        *,
        keeps_prefixes: bool,
        draws_next: bool,
    ) -> None:
        """Use `opened`."""
        super().__init__(config, policy, team)
        self._keeps_prefixes, self._draws_next = keeps_prefixes, draws_next
        self._datasets, self._accelerator = datasets, accelerator
        self._family = None if family is None else family.showing(datasets.first.cameras)
        self.data_sources = tuple(datasets.named)
        self._method = cache(self._make_method)

    @classmethod
    def opened(
        cls,
        config: FinetuneVLAConfig,
        accelerator: Accelerator,
        team: Team,
        *,
        packed: Path | None,
    ) -> VLAJob:
        """The policy and this process's part of the datasets, for which the machine is enough.

        Raises:
            UserError: one of these is not as it should be.
        """
        if config.peft.shard:
            check_several(team.size)
        device = own_device("policy.device", config.policy.device, accelerator)
        if config.policy.compile:
            team.together(lambda: check_compiler(device))
        if config.policy.cuda_graphs:
            check_cuda_graphs(device)
        family = team.together(lambda: _make_family(config))
        datasets, policy = team.together(
            lambda: checked_inputs(config, packed, device, team, family)
        )
        plan = planned_prefixes(config, datasets, policy, team, CRITIC_FEATURES)
        team.together(lambda: check_machine(config, datasets, policy, team, plan))
        if not config.resume:
            team.on_main(lambda: pin_inputs(config, packed, datasets))
        # The main process's: what is free may differ from one to the next.
        kept, draws = team.gather([plan().kept, plan().draws_next])[0]
        return cls(
            config,
            policy,
            datasets,
            family,
            accelerator,
            team,
            keeps_prefixes=kept,
            draws_next=draws,
        )

    @property
    def device(self) -> torch.device:
        """Of what is trained."""
        return next(self.policy.trainable_parameters()).device

    @property
    def title(self) -> str:
        """Method, policy and task."""
        where = f" on {self._family.task}" if self._family else ""
        return f"{name_of(self.config.method).upper()} of {self.policy.host.config.type}{where}"

    def begin(self, path: Path) -> Replay:
        """The base, where the adapters' is in no file, the settings and a replay of the data.

        A replay that the run had begun to fill before it broke off is filled on.
        """
        self.team.on_main(lambda: self._begin_folder(path.parent))
        if not self.team.is_main:
            give_base(self.config, self.policy, path.parent, writes=False)
        begun = Begun.read(path)
        replay = self._empty_replay(path) if begun is None else self.reopen(path)
        try:
            if begun is not None:
                replay.truncate_to(begun.episodes)
            self._datasets.fill(
                replay,
                say=print if self.team.is_main else lambda _: None,
                copies=self._lender is None,
                save=lambda: save_begun(replay, self.team),
            )
        except BaseException:
            replay.close()
            raise
        return replay

    def _begin_folder(self, output_dir: Path) -> None:
        give_base(self.config, self.policy, output_dir, writes=True)
        save_settings(self.config, output_dir)

    def _empty_replay(self, path: Path) -> Replay:
        more_steps, more_frames = self._more_room
        lender = self._lender
        replay = create_replay(
            path,
            list(self._datasets.named.values()),
            more_steps=more_steps,
            more_frames=more_frames,
            lent_frames=0 if lender is None else lender.num_frames,
        )
        if lender is not None:
            replay.borrow(lender)
        # Where prefixes come from is not decided anew by a run that goes on with this.
        CacheHeader(self._fingerprint, 0, {}).write(path)
        Begun.of(self.team).write(path)
        return replay

    def reopen(self, path: Path) -> Replay:
        """The replay of a run that is gone on with, which may have got more rollouts to come."""
        more_steps, more_frames = self._more_room
        replay = Replay.open(path)
        if self._lender is not None:
            replay.borrow(self._lender)
        replay.grow(self._datasets.num_rows + more_steps, self._datasets.num_frames + more_frames)
        return replay

    def take(self, replay: Replay) -> EpisodeStore:
        """The replay, and the cache of its frames' features, which is yet to be filled."""
        kept = self._packed if self._keeps_prefixes else self._without_prefix
        there = CacheHeader.read(replay.path)
        others = there is not None and there.fingerprint != self._fingerprint
        if there is not None and others and there.num_frames and self.team.is_main:
            print(
                f"the features of {there.num_frames:,} frames in {replay.path} are another "
                "policy's or another version's: they are made again"
            )
        self._replay = replay
        self._features = FeatureCache(replay, kept, fingerprint=self._fingerprint)
        return EpisodeStore(replay, self._features)

    @cached_property
    def _fingerprint(self) -> str:
        """Of everything that is kept of a frame."""
        whole = prefix_fingerprint(self.policy)
        return whole if self._keeps_prefixes else whole + FEATURES_ONLY

    def draw(
        self, sources: Sequence[str] | None = None, *, for_critic: bool = False
    ) -> ChunkSampler[Any]:
        """A sampler of prefixes; the critic alone needs its own features only."""
        critic = self._cached(*CRITIC_FEATURES)
        return self._replay.sampler(
            chunk_length=self.policy.executed_length,
            flow_length=self.policy.chunk_shape[0],
            discount=self.config.discount,
            short_chunks=self.config.dataset.short_chunks,
            reward=reward_of(self.config),
            sources=sources,
            observer=critic if for_critic else self._prefixes,
            next_observer=None if self._draws_next and not for_critic else critic,
            repeats=self._repeats,
        )

    @property
    def _repeats(self) -> dict[str, int]:
        """How many times as often it is drawn what a person did."""
        times = self.config.dataset.intervention_weight
        told = [name for name in self._replay.columns if tells_interventions(name)]
        return dict.fromkeys(told, times) if times > 1 else {}

    def check(self, everything: ChunkSampler[Any]) -> None:
        """The preflight of the data and the method, and then every frame's features."""
        config, policy, team = self.config, self.policy, self.team
        rewards = all_rewards(self._replay, everything, team)
        team.together(lambda: check_data(config, policy, self._replay, everything, rewards, team))
        with self.method().present():  # what it cannot be made of is refused here
            if last_checkpoint(self._replay.path.parent) is None:
                team.together(lambda: save_begun(self._replay, team, checked=True))
            team.together(lambda: self._features.update(safe=True))

    def method(self) -> Cached:
        """The method with many updates of the critic for each one of the policy."""
        return self._method()

    @property
    def valued(self) -> dict[str, Any]:
        """What the critic's numbers are returns of, and what it sees."""
        config = self.config
        every = (config.dataset, *config.dataset.more)
        rises = any(each.reward == "progress" for each in every)
        return super().valued | {
            "dataset.kind": config.dataset.kind,
            # Of the other sources each is a step's reward, and rounds may differ in them.
            "dataset.reward": "progress" if rises else None,
            **critic_sees(config),
        }

    def family(self) -> EnvFamily | None:
        """That of the settings."""
        return self._family

    def save_policy(self, folder: Path) -> None:
        """In LeRobot's own format."""
        merged = self.config.policy.merged
        self.policy.save_pretrained(folder, merged=merged)
        told = told_of_merging(self.policy.lost_by_merging) if merged else None
        if told is not None:
            print(f"{folder}: {told}; without --policy.merged=true they are saved by themselves")

    def publish(self) -> None:
        """The last checkpoint goes to the Hub, where that is wanted."""
        if self.config.policy.push_to_hub:
            push(self.config)

    @cached_property
    def _lender(self) -> LentPictures | None:
        """Of the datasets' frames, where no copy is made."""
        if self.config.replay.frames == "copy":
            return None
        return LentPictures(list(self._datasets.named.values()), threads=usable_cores())

    @property
    def _more_room(self) -> tuple[int, int]:
        """Steps and frames of the rollouts to come."""
        return room_for_rollouts(self.config, self.policy.executed_length)

    def _cached(self, *names: str) -> Observer[FrameObservation]:
        return NumberedFeatures(self._features, self._replay, names or None)

    @property
    def _prefixes(self) -> Observer[FrameObservation]:
        """What the policy encodes of the frames, from the disk or made as it is asked for."""
        if self._keeps_prefixes:
            return self._cached()
        return ComputedFeatures(self._replay, self._packed)

    def _packed(self, seen: FrameObservation) -> dict[str, torch.Tensor]:
        observation = {key: entry for key, entry in seen.items() if key != FRAME}
        with self.team.autocast():
            return self.policy.packed(observation)

    def _without_prefix(self, seen: FrameObservation) -> dict[str, torch.Tensor]:
        """What is kept where prefixes are not: features, and the frames' first next actions."""
        packed, method = self._packed(seen), self.method()
        kept = {name: packed[name] for name in CRITIC_FEATURES}
        if method.next_actions is not None:
            frames = seen[FRAME]
            assert isinstance(frames, torch.Tensor)
            keys = [(self.config.seed, FIRST_CHUNK_NOISE, frame) for frame in frames.tolist()]
            noise = KeyedNoise(keys, self.device)
            count = self.config.critic.next_actions
            kept[FIRST_CHUNKS] = method.next_actions.drawn_of(packed, noise, count)
        return kept

    def _make_method(self) -> Cached:
        knobs = self.config.critic
        if self.config.policy.compile:
            self.policy.evaluations.compile()
        if self.config.policy.cuda_graphs:
            batch = self.team.batch_share(self.config.batch_size)
            parts = slices(batch, self.config.micro_batches)
            self.policy.evaluations.record({batch, *(p.stop - p.start for p in parts)})
        critic = make_critic(knobs, self.policy, self.config.seed)
        method = make_method(
            self.policy,
            critic,
            self.config.method,
            self._accelerator,
            shard=self.config.peft.shard,
        )
        cached = Cached(
            method,
            self._next_actions(method) if method.requirements.next_actions else None,
            self._critic_sampler(),
            critic_updates=knobs.updates_per_step if method.requirements.learns_critic else 0,
            batch_size=self.team.batch_share(knobs.batch_size),
            redraws=knobs.redraws,
            draws_next=self._draws_next,
            num_micro_batches=self.config.micro_batches,
        )
        self._give_critic(cached)
        return cached

    def _critic_sampler(self) -> ChunkSampler[Any] | MixedSampler[Any]:
        """Of the critic's own batches: with the share of rollouts that the policy's have."""
        fraction = self.config.online.fraction
        if fraction is None:
            return self.draw(for_critic=True)
        before = [*self.data_sources, CRITIC, OFFLINE]
        return MixedSampler(
            self.draw(before, for_critic=True),
            self.draw([ONLINE], for_critic=True),
            online_fraction=self.team.fraction_share(fraction, self.config.critic.batch_size),
            waits=True,
        )

    def _next_actions(self, method: OffPolicyMethod) -> NextActions:
        return NextActions(
            self.policy,
            method.actor(),
            self._replay,
            self._prefixes,
            chunks_per_frame=self.config.critic.next_actions,
            first_actor=method.first_actor(),
            precision=self.team.autocast,
            first=None if self._keeps_prefixes else self._cached(FIRST_CHUNKS),
        )

    def _give_critic(self, method: Cached) -> None:
        """A new run starts with the critic that the settings name."""
        output_dir, path = self.config.output_dir, self.config.critic.path
        assert output_dir is not None
        if path is None or last_checkpoint(output_dir) is not None:
            return
        same_base = self.config.policy.adapter == "continue"
        self.team.together(
            lambda: load_algorithm(
                find_algorithm(path), method, trust_region=same_base, valued=self.valued
            )
        )


def prefix_fingerprint(policy: LeRobotFlowPolicy) -> str:
    """A hash of everything that the cached features depend on: frozen weights and statistics."""
    digest = hashlib.blake2b(digest_size=16)
    # Not where it lies; and other devices, or more rows at once, round otherwise.
    config = {k: v for k, v in vars(policy.host.config).items() if k not in PLACES}
    kind = next(policy.host.parameters()).device.type
    digest.update(repr((policy.critic_features, config, kind, policy.encoded_at_once)).encode())
    if policy.critic_features.pooling != "all":
        digest.update(policy.critic_features.pooling.encode())
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


def check_compiler(device: torch.device) -> None:
    """Compiles a sum.

    Raises:
        UserError: that does not work here.
    """
    add = torch.compile(lambda x: x + 1.0)
    try:
        add(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler's absence raises, down to the linker's
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(
            f"--policy.compile=true: torch.compile does not work on {device} here ({why}); install "
            "a C++ compiler, or leave it out"
        ) from None


def check_cuda_graphs(device: torch.device) -> None:
    """Refuses devices that have none.

    Raises:
        UserError: it is no GPU of CUDA's.
    """
    if device.type != "cuda":
        raise UserError(
            f"--policy.cuda_graphs=true: the policy is on {device}, which has no CUDA graphs; "
            "leave it out"
        )


def _make_family(config: FinetuneVLAConfig) -> EnvFamily | None:
    if config.env.type is None:
        return None
    return make_family(config.env, max_episode_steps=config.eval.max_episode_steps)

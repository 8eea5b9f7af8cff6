"""The settings of a run on a LeRobot policy; every knob has one owner, here or in its part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from vla_trqam.config.settings import CriticConfig, RunSettings
from vla_trqam.data.feature_cache import PrefixCache
from vla_trqam.data.sampling import RewardKind, ShortChunks
from vla_trqam.data.sources.lerobot.labels import RewardSource
from vla_trqam.data.sources.lerobot.rows import TaskChanges
from vla_trqam.envs.registry import EnvConfig, robomimic_task
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Offers
from vla_trqam.methods.registry import check_shard
from vla_trqam.report.flow_steps import check_flow_steps


@dataclass
class OneDatasetConfig:
    """A LeRobotDataset, and how it is read.

    Attributes:
        repo_id: of the dataset, on the Hub or of ``root``.
        root: its local folder; null looks where LeRobot does, and then on the Hub.
        revision: branch, tag or commit on the Hub; null for the newest v3 tag.
        episodes: numbers of those to read; null for all.
        reward: where rewards come from; null takes what there is. "progress" is what
            ``reward_column`` rises by in a step (rollouts have 1 at success), "column" the column
            as it is.
        reward_column: the column that rewards are read from, such as a reward model's; null for
            ``next.reward``.
        reward_file: a Parquet file in the dataset's folder that has it, such as a reward model's
            ``sarm_progress.parquet``; null for the dataset's tables.
        success_labels: a JSON list, one label for each episode of the dataset.
        instruction: a column of texts that holds the policy's instruction; null for the tasks.
        task_changes: where the task changes within an episode: "refuse", tell the policy the
            episode's "first", or each "frame" its own.
        tolerance_s: seconds that a frame's timestamp may be off its number, and a video's frame off
            the timestamp.
    """

    repo_id: str | None = None
    root: Path | None = None
    revision: str | None = None
    episodes: tuple[int, ...] | None = None
    reward: RewardSource | None = None
    reward_column: str | None = None
    reward_file: str | None = None
    success_labels: Path | None = None
    instruction: str | None = None
    task_changes: TaskChanges = "refuse"
    tolerance_s: float = 1e-4

    def __post_init__(self) -> None:
        """A shell leaves the ``~`` of ``--flag=~/folder`` and of quoted YAML as it is."""
        for name in ("root", "success_labels"):
            path = getattr(self, name)
            if path is not None:
                setattr(self, name, path.expanduser())


@dataclass
class MoreDatasetConfig(OneDatasetConfig):
    """A further dataset, of the same robot and cameras.

    Attributes:
        kind: what the critic makes of its rewards; null for the first dataset's. All kinds must
            come to one scale.
        rename_map: from its cameras to the policy's; null for the run's.
    """

    kind: RewardKind | None = None
    rename_map: dict[str, str] | None = None


@dataclass
class VLADatasetConfig(OneDatasetConfig):
    """The replay's offline data: a LeRobotDataset, or several.

    Attributes:
        kind: what the critic maximises, in the first dataset and in rollouts.
        short_chunks: chunks that the episode's end cuts short.
        more: further datasets, like ``[{repo_id: me/round1, root: runs/round1, reward: success}]``,
            with the flags of the first as keys.
        columns: further columns that travel into the replay; null for those that tell of
            interventions, in which a dataset without them has zeros.
        intervention_weight: how many times as often a chunk is drawn in which a person acts.
    """

    kind: RewardKind = "success_minus_one"
    short_chunks: ShortChunks = "pad"
    more: list[MoreDatasetConfig] = field(default_factory=list)
    columns: tuple[str, ...] | None = None
    intervention_weight: int = 1


@dataclass
class ReplayConfig:
    """What is kept of the datasets.

    Attributes:
        frames: "copy" decodes every frame once and keeps it raw beside the replay; "dataset" reads
            it from the dataset's videos whenever it is drawn, which takes no room.
    """

    frames: Literal["copy", "dataset"] = "copy"


@dataclass
class VLAPolicyConfig:
    """The pretrained policy, and where the tuned one goes.

    Attributes:
        path: folder or Hub repository of the policy; null for the packed one.
        revision: branch, tag or commit on the Hub.
        device: where it runs; null takes the launcher's.
        adapter: of a checkpoint that is an adapter: "merge" makes it the new base, "continue" goes
            on against its own base.
        n_action_steps: n, the actions of a chunk that are executed, which the critic values; null
            takes the policy's own.
        tuned_flow_steps: K that training and the tuned policy take; null for the policy's own.
            Few steps want ``method.scheme: posterior``.
        tokenizer: local folder of the tokenizer that its preprocessor takes; null for the one that
            it names, which may be on the Hub and gated.
        compile: the fields' evaluations in an update are compiled (torch.compile), which the first
            updates wait for.
        cuda_graphs: the fields' evaluations in an update are recorded at first and then replayed
            (CUDA graphs): a GPU no longer waits for each small operation's launch.
        critic_layer: the language model's layer that the critic sees, see ``CriticFeatures``.
        critic_pooling: the critic sees its mean over "all" tokens, or over "parts", each camera's
            and the rest's by themselves.
        merged: checkpoints are whole policies with the adapters in them, not adapters alone; in
            weights of half precision what the adapters change is rounded.
        push_to_hub: push the last checkpoint.
        repo_id: the Hub repository to push to.
        private: whether a new repository is private.
    """

    path: str | None = None
    revision: str | None = None
    device: str | None = None
    adapter: Literal["merge", "continue"] = "merge"
    n_action_steps: int | None = None
    tuned_flow_steps: int | None = None
    tokenizer: Path | None = None
    compile: bool = False
    cuda_graphs: bool = False
    critic_layer: int | None = -1
    critic_pooling: Literal["all", "parts"] = "all"
    merged: bool = False
    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool | None = None


@dataclass
class PeftConfig:
    """What is trained of the action expert.

    Attributes:
        method: "lora", or "full" against a frozen copy of the expert.
        r: rank of the adapters.
        lora_alpha: their output is scaled by ``lora_alpha / r``; null takes ``r``.
        target_modules: a regular expression; null takes LeRobot's for the policy.
        shard: of several processes, each keeps a part of what is trained in full, of its gradients
            and of Adam's moments (FSDP2).
    """

    method: Literal["lora", "full"] = "lora"
    r: int = 16
    lora_alpha: int | None = None
    target_modules: str | None = None
    shard: bool = False


@dataclass
class VLACriticConfig(CriticConfig):
    """The critic ensemble and its updates beside the policy's.

    Attributes:
        path: a checkpoint's folder, or the Hub repository that one was pushed to, whose critic the
            run starts with; and with ``policy.adapter: continue`` its trust region too.
        updates_per_step: updates of the critic alone, after each one of the policy.
        batch_size: chunks in each of the critic's own updates.
        next_actions: chunks of the policy kept at every frame for the TD targets.
        redraws: frames whose oldest next action is drawn anew after each update of the policy,
            beside those of its batch.
        draw_next: each update of the policy draws the next actions of its batch, which takes the
            next frames' prefixes too; false takes those kept, and draws new ones at the batch's own
            frames; null does so where no prefixes are kept.
    """

    path: str | None = None
    warmup_steps: int = 10000
    updates_per_step: int = 20
    batch_size: int = 256
    next_actions: int = 8
    redraws: int = 0
    draw_next: bool | None = None


@dataclass
class FinetuneVLAConfig(RunSettings):
    """Every setting of the recipes for LeRobot's policies; ``--preset`` names a section.

    Attributes:
        micro_batches: parts that the policy's batch is taken in, one after the other: less memory.
        dataset: the replay's offline data.
        rename_map: from the dataset's cameras to those that the policy looks through, like
            ``{observation.images.front: observation.images.top}``.
        policy: the policy.
        replay: what is kept of the datasets.
        prefix_cache: keys and values of each frame's vision-language prefix: kept on the "disk", or
            "none" but the critic's features of it, kilobytes, and computed in each update of the
            policy for its batch; "auto" keeps them where the budget has room for all.
        prefix_cache_gib: that budget, of all processes; null for half of what is free.
        peft: what is trained of it.
        online: updates with rollouts between them; none without ``env``.
        env: the simulator.
    """

    OFFERS: ClassVar[Offers] = Offers(training_base=False, interventions=True)

    steps: int = 1000
    base_episodes: int = 0
    batch_size: int = 32
    micro_batches: int = 1
    evaluate_every: int = 0
    log_freq: int = 10
    save_freq: int = 250
    dataset: VLADatasetConfig = field(default_factory=VLADatasetConfig)
    rename_map: dict[str, str] = field(default_factory=dict)
    policy: VLAPolicyConfig = field(default_factory=VLAPolicyConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    prefix_cache: PrefixCache = "auto"
    prefix_cache_gib: float | None = None
    peft: PeftConfig = field(default_factory=PeftConfig)
    critic: VLACriticConfig = field(default_factory=VLACriticConfig)
    env: EnvConfig = field(default_factory=EnvConfig)

    @property
    def warmup_batch_size(self) -> int:
        """Chunks a batch of the updates of the critic alone."""
        return self.critic.batch_size

    def _at_least_one(self) -> dict[str, int | None]:
        return {
            "micro_batches": self.micro_batches,
            "peft.r": self.peft.r,
            "peft.lora_alpha": self.peft.lora_alpha,
            "policy.n_action_steps": self.policy.n_action_steps,
            "policy.tuned_flow_steps": self.policy.tuned_flow_steps,
            "critic.batch_size": self.critic.batch_size,
            "critic.next_actions": self.critic.next_actions,
            "dataset.intervention_weight": self.dataset.intervention_weight,
            "env.image_size": self.env.image_size,
        }

    def _not_negative(self) -> dict[str, int | None]:
        return {
            "critic.updates_per_step": self.critic.updates_per_step,
            "critic.redraws": self.critic.redraws,
        }

    def _check_choices(self) -> None:
        if self.env.type is None and self.online.steps + self.base_episodes > 0:
            raise UserError(
                f"--online.steps={self.online.steps} and --base_episodes={self.base_episodes} need "
                "a simulator: give --env.type=robomimic, or set both to 0"
            )
        if self.env.type in (None, "robomimic"):
            robomimic_task(self.env.task)
        if self.micro_batches > self.batch_size:
            raise UserError(
                f"--micro_batches={self.micro_batches} is more than --batch_size={self.batch_size}"
            )
        if self.policy.push_to_hub and self.policy.repo_id is None:
            raise UserError("--policy.push_to_hub=true needs --policy.repo_id=USER/NAME")
        if self.policy.tokenizer is not None and not self.policy.tokenizer.expanduser().is_dir():
            raise UserError(f"--policy.tokenizer={self.policy.tokenizer} is not a folder")
        if self.policy.push_to_hub and self.policy.tokenizer is not None:
            raise UserError(
                "--policy.push_to_hub=true would push processors that name a folder of this "
                f"machine, --policy.tokenizer={self.policy.tokenizer}: leave one of both out, or "
                "push when the run is done, by hub push --tokenizer=NAME"
            )
        self._check_shard()
        self._check_cuda_graphs()
        self._check_datasets()
        self._check_prefix_cache()
        tuned = self.policy.tuned_flow_steps
        if tuned is not None:
            check_flow_steps(tuned, f"--policy.tuned_flow_steps={tuned}", self.method)
        super()._check_choices()

    def _check_shard(self) -> None:
        if not self.peft.shard:
            return
        if self.peft.method == "lora":
            raise UserError(
                "--peft.shard=true: adapters are a thousandth of the model, every process keeps "
                "them whole; leave it out, or train in full with --peft.method=full"
            )
        for name in ("compile", "cuda_graphs"):
            if getattr(self.policy, name):
                raise UserError(
                    f"--peft.shard=true and --policy.{name}=true do not go together: leave one out"
                )
        try:
            check_shard(self.method)
        except UserError as error:
            raise UserError(f"--peft.shard=true: {error}") from None

    def _check_cuda_graphs(self) -> None:
        if not self.policy.cuda_graphs:
            return
        if self.policy.compile:
            raise UserError(
                "--policy.cuda_graphs=true and --policy.compile=true do not go together: leave one "
                "out"
            )
        if not getattr(self.method, "keep_activations", True):
            raise UserError(
                "--policy.cuda_graphs=true and --method.keep_activations=false do not go together: "
                "recordings keep every flow step's activations; leave one out"
            )

    def _check_prefix_cache(self) -> None:
        budget = self.prefix_cache_gib
        if budget is None:
            return
        if not 0.0 < budget < math.inf:
            raise UserError(f"--prefix_cache_gib={budget:g} must be positive and finite")
        if self.prefix_cache == "none":
            raise UserError(
                f"--prefix_cache_gib={budget:g} is a budget of what --prefix_cache=none does not "
                "keep: leave one of both out"
            )

    def _check_datasets(self) -> None:
        if (self.policy.path is None) != (self.dataset.repo_id is None):
            raise UserError(
                "--policy.path and --dataset.repo_id go together: without both, the packed policy "
                "learns from the packed dataset"
            )
        for number, data in enumerate(self.dataset.more):
            if data.repo_id is None:
                raise UserError(f"--dataset.more[{number}] names no repo_id")

"""The settings of a run on states; every knob has one owner, here or in the part it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vla_trqam.config.settings import RunSettings
from vla_trqam.data.sampling import AnyReward, RewardKind, ShortChunks
from vla_trqam.envs.robomimic.env_meta import LOW_DIM_KEYS
from vla_trqam.errors import UserError
from vla_trqam.methods.bc import BehaviourCloningConfig
from vla_trqam.report.flow_steps import check_flow_steps


@dataclass
class DatasetConfig:
    """The replay's offline data.

    Attributes:
        path: a Robomimic HDF5 file; without path and name, the packed file of Lift.
        name: an official dataset ("lift/mh"), downloaded from the Hub.
        filter_key: only the demos of this key.
        num_demos: so many of the demos that are not cloned, spread evenly over the file; null for
            all.
        obs_keys: low-dimensional observations, concatenated in this order.
        reward: what the critic maximises.
        short_chunks: chunks that the episode's end cuts short.
    """

    path: Path | None = None
    name: str | None = None
    filter_key: str | None = None
    num_demos: int | None = None
    obs_keys: tuple[str, ...] = LOW_DIM_KEYS
    reward: RewardKind = "success_minus_one"
    short_chunks: ShortChunks = "pad"


@dataclass
class PolicyConfig:
    """The policy: a checkpoint, or the shape of a new one.

    Attributes:
        path: folder of a pretrained policy, whose shape it keeps; skips the pretraining.
        chunk_length: H.
        n_action_steps: n, the actions of a chunk that are executed before the next is asked for;
            null for all.
        hidden_dims: widths of the hidden layers.
        layer_norm: normalise after every activation.
        num_flow_steps: K, the steps from noise to action of the pretrained policy.
        tuned_flow_steps: K that training and the tuned policy take; null for the policy's own.
            Few steps want ``method.scheme: posterior``.
    """

    path: Path | None = None
    chunk_length: int = 5
    n_action_steps: int | None = None
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = False
    num_flow_steps: int = 10
    tuned_flow_steps: int | None = None


@dataclass
class PretrainConfig:
    """Behaviour cloning of the base.

    Attributes:
        steps: updates.
        batch_size: chunks a batch.
        filter_key: the demos of this key; None for all of the replay's.
        num_demos: the first so many of them; None for all.
        optimizer: its step size and averaging.
    """

    steps: int = 5000
    batch_size: int = 256
    filter_key: str | None = None
    num_demos: int | None = None
    optimizer: BehaviourCloningConfig = field(default_factory=BehaviourCloningConfig)


class StateData(Protocol):
    """What every recipe of states asks of its offline data."""

    path: Path | None
    short_chunks: ShortChunks

    @property
    def reward(self) -> AnyReward:
        """What the critic maximises."""


class Cloning(Protocol):
    """What every recipe of states asks of the pretraining."""

    steps: int
    batch_size: int
    optimizer: BehaviourCloningConfig


@dataclass
class StateRunConfig(RunSettings):
    """Every setting of a run on states; a recipe's own say what data and which cloning.

    Attributes:
        dataset: the replay's offline data.
        policy: the policy.
        pretrain: behaviour cloning of the base.
        base_run: folder of a run with ``--steps=0 --online.steps=0`` and otherwise the same data,
            policy, cloning, evaluation and seed: this run begins with its base and the base's
            episodes, to the bit what it would have made by itself.
    """

    dataset: StateData = field(default_factory=DatasetConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    pretrain: Cloning = field(default_factory=PretrainConfig)
    base_run: Path | None = None

    def _makes_a_base(self) -> bool:
        return self.policy.path is None and self.base_run is None

    def _at_least_one(self) -> dict[str, int | None]:
        return {
            "policy.chunk_length": self.policy.chunk_length,
            "policy.n_action_steps": self.policy.n_action_steps,
            "policy.hidden_dims": min(self.policy.hidden_dims, default=0),
            "policy.num_flow_steps": self.policy.num_flow_steps,
            "policy.tuned_flow_steps": self.policy.tuned_flow_steps,
            "pretrain.steps": self.pretrain.steps,
            "pretrain.batch_size": self.pretrain.batch_size,
        }

    def _check_data(self) -> None:
        """Refuses settings of the recipe's own data that do not go together."""

    def check_executed(self, chunk_length: int, whose: str, own: int | None = None) -> None:
        """Refuses a number of executed actions that chunks or episodes do not have.

        Args:
            chunk_length: H.
            whose: what says so.
            own: n of a given policy; None where it executes whole chunks.

        Raises:
            UserError: there are fewer actions in a chunk, or fewer steps in an episode.
        """
        executed = self.policy.n_action_steps or own or chunk_length
        if executed > chunk_length:
            raise UserError(
                f"--policy.n_action_steps={executed} is more than the {chunk_length} actions of "
                f"{whose}"
            )
        if self.eval.max_episode_steps < executed:
            raise UserError(
                f"--eval.max_episode_steps={self.eval.max_episode_steps} ends every episode within "
                f"its first chunk of {executed} steps"
            )

    def _check_choices(self) -> None:
        self._check_data()
        if self.policy.path is None:
            self.check_executed(self.policy.chunk_length, "--policy.chunk_length")
        tuned = self.policy.tuned_flow_steps
        if tuned is not None:
            check_flow_steps(tuned, f"--policy.tuned_flow_steps={tuned}", self.method)
        elif self.policy.path is None:
            own = self.policy.num_flow_steps
            check_flow_steps(own, f"--policy.num_flow_steps={own}", self.method)
        super()._check_choices()


@dataclass
class FinetuneRobomimicConfig(StateRunConfig):
    """Every setting of the recipe; ``--preset`` names a section of finetune_robomimic.yaml."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def _at_least_one(self) -> dict[str, int | None]:
        return super()._at_least_one() | {
            "pretrain.num_demos": self.pretrain.num_demos,
            "dataset.num_demos": self.dataset.num_demos,
        }

    def _check_data(self) -> None:
        if self.dataset.path is not None and self.dataset.name is not None:
            raise UserError("--dataset.path and --dataset.name are both given; choose one")
        keys = self.dataset.obs_keys
        if len(set(keys)) < len(keys):
            raise UserError(f"--dataset.obs_keys=[{', '.join(keys)}] has an observation twice")


def refuse_idle_flags(config: StateRunConfig, flags: set[str]) -> None:
    """Refuses flags that a given policy leaves without effect.

    Args:
        config: all settings.
        flags: the names, with their dashes, of those on the command line.

    Raises:
        UserError: there is such a flag.
    """
    if config.policy.path is None:
        return
    used = {"--policy.path", "--policy.tuned_flow_steps", "--policy.n_action_steps"}
    idle = sorted(f for f in flags - used if f.startswith(("--policy.", "--pretrain")))
    if idle:
        raise UserError(
            f"--policy.path={config.policy.path} is a policy that is trained already and has its "
            f"own shape; leave out {', '.join(idle)}"
        )

"""What acts of a run, a checkpoint or a policy that lies in a folder, whatever its method.

Of a method whose policy acts by itself that is the saved policy; of others it is made of the
method's own networks, which are rebuilt by the settings of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.config.settings import RunSettings
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.foreign import check_header, read_json
from vla_trqam.engine.folder.checkpoints import (
    ALGORITHM,
    NETWORKS,
    PRETRAINED,
    TRAINING,
    last_checkpoint,
    load_networks,
    read_position,
)
from vla_trqam.engine.folder.manifest import damage
from vla_trqam.engine.folder.pins import Pin, read_pins
from vla_trqam.engine.folder.run_folder import BASE_NAME, CONFIG_NAME
from vla_trqam.engine.launch import make_critic
from vla_trqam.envs.base import EnvFamily
from vla_trqam.errors import UserError
from vla_trqam.jobs.kinds import settings_of_run
from vla_trqam.methods.base import Actor, FlowActor
from vla_trqam.methods.registry import make_method, name_of, requirements_of
from vla_trqam.policy import FlowPolicy

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

POLICY_CONFIG = "config.json"
# A checkpoint's folder lies in its run's, and a policy's in a checkpoint's.
DEPTH = 4
OF_EVERY_METHOD = {"policy", "critic", "average", "next_actions", "reward"}
# Of a run in pretraining there are no networks of the method yet.
CLONING = "pretrain"


@dataclass(frozen=True)
class Place:
    """Where something that can act lies.

    Attributes:
        flag: that named it.
        policy: folder of the saved policy.
        checkpoint: the whole of it; None for a policy by itself.
        run: the run's folder; None where it belongs to none.
        settings: of the run.
    """

    flag: str
    policy: Path
    checkpoint: Path | None
    run: Path | None
    settings: RunSettings | None

    @classmethod
    def find(cls, flag: str, path: Path) -> Place:
        """What a folder holds.

        Raises:
            UserError: none of the three kinds, or a run without a checkpoint.
        """
        folder = path.expanduser().resolve()
        if (folder / CONFIG_NAME).is_file():
            checkpoint = last_checkpoint(folder)
            if checkpoint is None:
                raise UserError(f"--{flag}={path} is a run that has no checkpoint yet")
        else:
            checkpoint = folder if (folder / PRETRAINED).is_dir() else None
        policy = folder if checkpoint is None else checkpoint / PRETRAINED
        if not any((policy / name).is_file() for name in (POLICY_CONFIG, "adapter_config.json")):
            raise UserError(
                f"--{flag}={path} must be the folder of a run, of a checkpoint or of a policy"
            )
        above = (folder, *folder.parents)[:DEPTH]
        run = next((place for place in above if (place / CONFIG_NAME).is_file()), None)
        settings = None if run is None else settings_of_run(run)
        return cls(flag, policy, checkpoint, run, settings)

    @property
    def precision(self) -> str | None:
        """What the run's networks compute in; None where no run's checkpoint says so."""
        saved = self.checkpoint or (None if self.run is None else last_checkpoint(self.run))
        return read_position(saved).precision if saved is not None and _of_a_run(saved) else None


@dataclass(frozen=True)
class Contestant:
    """What is evaluated.

    Attributes:
        what: in words.
        policy: which sees the observations.
        actor: whose chunks.
        precision: what the networks compute in, see :func:`networks_precision`.
    """

    what: str
    policy: FlowPolicy
    actor: Actor
    precision: str


@dataclass(frozen=True)
class Loading:
    """How policies are loaded.

    Attributes:
        family: the simulator that they will act in.
        device: where to.
        settings: of a run, for what belongs to none.
        precision: the launcher's, for what belongs to none.
        kind: of the policy that the run of these settings has, whose tokenizer is no other kind's.
    """

    family: EnvFamily
    device: torch.device
    settings: RunSettings | None
    precision: str
    kind: str | None = None

    def contestant(self, place: Place) -> Contestant:
        """What acts there.

        Raises:
            UserError: something is missing, damaged, or does not fit.
        """
        policy = self.policy(place.policy, place.settings)
        method = None if place.checkpoint is None else acting_method(place.checkpoint, place)
        precision = self.precision_of(place)
        if method is None:
            kind = "policy" if place.checkpoint is None else "saved policy"
            return Contestant(f"the {kind} in {place.policy}", policy, FlowActor(policy), precision)
        assert place.checkpoint is not None
        what = f"{method.upper()}'s networks in {place.checkpoint}"
        actor = self._actor(place.checkpoint, place.settings, policy)
        return Contestant(what, policy, actor, precision)

    def precision_of(self, place: Place) -> str:
        """What the networks of a run computed in; of no run, the launcher's."""
        return place.precision or self.precision

    def _actor(self, checkpoint: Path, settings: RunSettings | None, policy: FlowPolicy) -> Actor:
        assert settings is not None, "a method is known by the settings of its run"
        method = make_method(
            policy, make_critic(settings.critic, policy, settings.seed), settings.method
        )
        # Of a large policy the checkpoint's own folder has the weights, and these are what trains.
        whole = isinstance(policy, MLPFlowPolicy)
        load_networks(checkpoint, method, without=() if whole else ("policy", "next_actions"))
        return method.actor()

    def base_of(self, place: Place) -> FlowPolicy:
        """The base that the run of a place began with.

        Raises:
            UserError: there is none any more, or it is another.
        """
        assert place.run is not None
        own = place.run / BASE_NAME
        if own.is_dir():
            return self.policy(own, place.settings)
        if not isinstance(place.settings, FinetuneVLAConfig):
            raise UserError(f"{own} is gone, the base of the run: name another policy by --b")
        return self._given_base(place.run, place.settings)

    def _given_base(self, run: Path, settings: FinetuneVLAConfig) -> FlowPolicy:
        pins, knobs = read_pins(run), settings.policy
        given, below = pins.get("policy"), pins.get("base")
        path, revision = knobs.path, knobs.revision
        for pin in (given, below):
            _check_still(pin, run)
        if given is not None:
            # The path of a folder may be relative to where the run was begun.
            path = path if given.commit else given.folder
            revision = given.commit or revision
        if path is None:
            raise UserError(f"{run} does not say which policy it began with: name one by --b")
        policy = self._lerobot(
            path,
            settings,
            adapter=knobs.adapter,
            revision=revision,
            base_revision=None if below is None else below.commit,
        )
        if knobs.n_action_steps is not None:
            policy.take_executed_length(knobs.n_action_steps)
        return policy

    def policy(self, folder: Path, settings: RunSettings | None) -> FlowPolicy:
        """A saved policy; adapters are on their base.

        Raises:
            UserError: it cannot be loaded.
        """
        kind = policy_type(folder)
        if kind == "mlp_flow":
            return MLPFlowPolicy.from_pretrained(folder).to(self.device)
        lent = self.settings if kind == self.kind else None
        return self._lerobot(str(folder), settings or lent, adapter="continue")

    def _lerobot(
        self,
        path: str,
        settings: RunSettings | None,
        *,
        adapter: str,
        revision: str | None = None,
        base_revision: str | None = None,
    ) -> LeRobotFlowPolicy:
        from vla_trqam.adapters.critic_features import CriticFeatures
        from vla_trqam.adapters.loading import load_policy

        knobs = settings.policy if isinstance(settings, FinetuneVLAConfig) else None
        policy = load_policy(
            path,
            lora=None,
            adapter="continue" if adapter == "continue" else "merge",
            features=None
            if knobs is None
            else CriticFeatures(knobs.critic_layer, pooling=knobs.critic_pooling),
            limits=self.family.action_limits,
            device=str(self.device),
            revision=revision,
            base_revision=base_revision,
            tokenizer=None if knobs is None else knobs.tokenizer,
        )
        assert policy.processors is not None, "load_policy brings processors"
        policy.processors.pad_instructions()
        return policy


def policy_type(folder: Path) -> str | None:
    """What its config calls itself; None without one."""
    config = folder / POLICY_CONFIG
    return read_json(config).get("type") if config.is_file() else None


def _check_still(pin: Pin | None, run: Path) -> None:
    """Refuses files of this machine that are not those that a run began with."""
    if pin is None or pin.folder is None or pin.commit:
        return
    for name, facts in pin.files.items():
        path = Path(pin.folder) / name
        if not facts.is_still(path):
            raise UserError(
                f"{path} is not the one that the run in {run} began with: bring that one back, or "
                "name another policy by --b"
            )


def _of_a_run(checkpoint: Path) -> bool:
    """Whether it says where its run stands, which one that was pulled from the Hub does not."""
    return (checkpoint / TRAINING).is_dir()


def acting_method(checkpoint: Path, place: Place) -> str | None:
    """The method whose networks act; None where the saved policy does.

    Raises:
        UserError: the checkpoint is damaged, or its method acts by networks that no settings tell.
    """
    wrong = damage(checkpoint)
    if wrong is not None:
        raise UserError(wrong)
    if place.settings is not None:
        if _of_a_run(checkpoint) and read_position(checkpoint).phase == CLONING:
            return None
        knobs = place.settings.method
        return None if requirements_of(knobs).host_acts else name_of(knobs)
    networks = checkpoint / ALGORITHM / NETWORKS
    if networks.is_file():
        check_header(networks)
        with safe_open(networks, framework="pt") as file:
            own = sorted({key.partition(".")[0] for key in file.keys()} - OF_EVERY_METHOD)
        if own:
            raise UserError(
                f"--{place.flag}: {checkpoint} acts by networks of its method ({', '.join(own)}), "
                f"which only the settings of its run can rebuild: put it into a folder with its "
                f"{CONFIG_NAME}"
            )
    return None

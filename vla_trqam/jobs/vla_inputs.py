"""What a run of a LeRobot policy begins with, and its push at the end.

The process's part of the dataset and the policy, after all that needs neither has been checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vla_trqam.adapters.critic_features import CriticFeatures
from vla_trqam.adapters.dataset_check import check_against_dataset
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import (
    adapter_settings,
    camera_names,
    flow_steps_of,
    load_policy,
)
from vla_trqam.adapters.lora import LoRASettings
from vla_trqam.config.vla_settings import (
    FinetuneVLAConfig,
    MoreDatasetConfig,
    OneDatasetConfig,
    PeftConfig,
)
from vla_trqam.data.frames import IMAGE_PREFIX
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardKind, RewardSpec
from vla_trqam.data.sources.lerobot.lending import check_lends
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets, check_rollouts, source_names
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.data.transitions import INTERVENTION, tells_interventions
from vla_trqam.engine.folder.checkpoints import ALGORITHM, last_checkpoint
from vla_trqam.engine.folder.run_folder import BASE_NAME, REPLAY_NAME
from vla_trqam.engine.processes.team import Team
from vla_trqam.envs.base import EnvFamily
from vla_trqam.errors import UserError
from vla_trqam.files import written_durably
from vla_trqam.hub.access import check_push
from vla_trqam.hub.pull import check_valued
from vla_trqam.hub.push import push_checkpoint
from vla_trqam.jobs.vla_pins import take_pins
from vla_trqam.methods.registry import check_pushed, name_of, requirements_of
from vla_trqam.report.flow_steps import check_own_steps

NO_PACKED = "give --policy.path and --dataset.repo_id: this recipe has no packed ones"
LOCAL_BASE = "would push adapters whose base is a folder of this machine; add --policy.merged=true"


def checked_inputs(
    config: FinetuneVLAConfig,
    packed: Path | None,
    device: torch.device,
    team: Team,
    family: EnvFamily | None,
) -> tuple[LeRobotDatasets, LeRobotFlowPolicy]:
    """This process's part of the dataset and the policy, after all that needs neither is checked.

    Raises:
        UserError: see :func:`finetune`.
    """
    _check_sizes(config, team)
    if team.is_main:
        _check_push(config)
    base_revision = take_pins(config)
    say = print if team.is_main else lambda _: None
    given = _given_policy(config, packed)
    _check_continued(config, given)
    _check_lent_critics(config)
    check_own_steps(flow_steps_of(*given), config.policy.tuned_flow_steps, config.method)
    seen = _looked_through(config, given)
    configs = [replace(data, looked_through=seen) for data in dataset_configs(config, packed)]
    whole = LeRobotDatasets.opened(configs)
    _check_interventions(config, whole)
    datasets = whole.part(team.rank, team.size)
    reader = datasets.first
    if config.num_training_episodes:
        check_rollouts(reader)
    policy = _load_policy(config, given, base_revision, device, say, family)
    # Before anything is decoded.
    for each in datasets.named.values():
        name = each.where if len(datasets.named) > 1 else "this dataset"
        check_against_dataset(policy, each.features, name=name)
    # A single camera without a name is `observation.image`.
    cameras = [key for key in reader.features if key.startswith("observation.image")]
    for note in policy.cameras(cameras).notes():
        say(note)
    if family is not None:
        _check_simulator(config, reader, policy, family, say)
    _check_base(config, policy)
    datasets.check_cameras()
    if config.replay.frames == "dataset":
        for each in datasets.named.values():
            check_lends(each)
    return datasets, policy


def _check_lent_critics(config: FinetuneVLAConfig) -> None:
    """They see of the policy what this run's critic would."""
    for knob, folder in config.method.lent_critics.items():
        check_valued(folder / ALGORITHM, critic_sees(config), f"--method.{knob}")


def _check_interventions(config: FinetuneVLAConfig, datasets: LeRobotDatasets) -> None:
    """A person took over somewhere in the datasets, of which every process sees all."""
    weighed = config.dataset.intervention_weight > 1
    if not weighed and not config.method.reads_interventions:
        return
    flag = "--dataset.intervention_weight" if weighed else "--method.clone_interventions"
    columns = [name for name in datasets.first.columns if tells_interventions(name)]
    if not columns:
        raise UserError(
            f"{flag} needs a column that tells which actions a person took, "
            f"{' or '.join(INTERVENTION)}, in one of the datasets at least; none has it"
        )
    if not any(each.any_true(name) for each in datasets.named.values() for name in columns):
        raise UserError(
            f"{flag}: {' and '.join(columns)} is false in every row, so no action of a person is "
            "among the data"
        )


def critic_sees(config: FinetuneVLAConfig) -> dict[str, Any]:
    """The flags that say what of the policy a critic sees."""
    return {
        "policy.critic_layer": config.policy.critic_layer,
        "policy.critic_pooling": config.policy.critic_pooling,
    }


def give_base(
    config: FinetuneVLAConfig, policy: LeRobotFlowPolicy, output_dir: Path, *, writes: bool
) -> None:
    """Where adapters were merged into the base, the run's folder gets it, once and whole.

    The adapters of its checkpoints name it there, and a resumed run loads it from there.

    Of several processes one ``writes``.
    """
    if config.policy.merged or not policy.lacks_base:
        return
    folder = (output_dir / BASE_NAME).resolve()
    if writes:
        with written_durably(folder) as part:
            policy.save_base(part)
        print(
            f"the policy with its adapters merged in is the base: {folder}, which must stay there"
        )
    policy.name_base(folder)


def _given_policy(config: FinetuneVLAConfig, packed: Path | None) -> tuple[str, str | None]:
    """Path and revision of what the run begins with; a resumed run may have its own copy."""
    assert config.output_dir is not None
    own = config.output_dir / BASE_NAME
    if config.resume and own.is_dir():
        return str(own), None
    if config.policy.path is not None:
        return config.policy.path, config.policy.revision
    if packed is None:
        raise UserError(NO_PACKED)
    return str(packed / "policy"), None


def _check_continued(config: FinetuneVLAConfig, given: tuple[str, str | None]) -> None:
    """What goes on are adapters, as they are."""
    if config.policy.adapter != "continue" or config.resume:
        return
    flag, peft = "--policy.adapter=continue", config.peft
    own = adapter_settings(*given)
    if own is None:
        raise UserError(
            f"{flag}: {given[0]} is a whole policy and no adapter, so there is no other base that "
            "it could go on against; leave it out, and the policy is the base"
        )
    if not requirements_of(config.method).trains_field:
        raise UserError(
            f"{flag}: {name_of(config.method)} trains nothing of the policy and acts by its base, "
            "so what the adapters learnt would be lost; --policy.adapter=merge makes it part of it"
        )
    if peft.method != "lora":
        raise UserError(
            f"{flag} and --peft.method={peft.method} do not go together: what goes on are the "
            "adapters of the checkpoint; leave one out"
        )
    for name in ("r", "lora_alpha", "target_modules"):
        value = getattr(peft, name)
        if value not in (getattr(PeftConfig(), name), own.get(name)):
            raise UserError(
                f"--peft.{name}={value}: the adapters that {flag} goes on with have "
                f"{own.get(name)}; leave it out"
            )


def _looked_through(config: FinetuneVLAConfig, given: tuple[str, str | None]) -> tuple[str, ...]:
    """The policy's cameras, which alone are opened; or all those that a resumed replay has."""
    assert config.output_dir is not None
    if config.resume and last_checkpoint(config.output_dir) is not None:
        replay = Replay.open(config.output_dir / REPLAY_NAME)
        names = tuple(replay.cameras)
        replay.close()
        return names
    return tuple(key.removeprefix(IMAGE_PREFIX) for key in camera_names(*given))


def _check_base(config: FinetuneVLAConfig, policy: LeRobotFlowPolicy) -> None:
    """What is known of the adapters' base only when they are loaded."""
    assert config.output_dir is not None
    if config.policy.merged or not policy.lacks_base:
        return
    if config.policy.push_to_hub:  # the adapters came from the Hub, or _check_push had seen it
        raise UserError(f"--policy.push_to_hub=true {LOCAL_BASE}")
    if config.resume and last_checkpoint(config.output_dir) is not None:
        raise UserError(
            f"{config.output_dir / BASE_NAME} is gone, on which the adapters in this run's "
            "checkpoints are: put it back"
        )


def _check_simulator(
    config: FinetuneVLAConfig,
    reader: LeRobotReader,
    policy: LeRobotFlowPolicy,
    family: EnvFamily,
    say: Callable[[str], None],
) -> None:
    """The policy looks through the simulator's cameras; what is rolled out joins the dataset."""
    for note in family.notes:
        say(note)
    joins = bool(config.online.steps or config.base_episodes)
    own = {key.removeprefix(IMAGE_PREFIX) for key in policy.host.config.image_features}
    there, known = set(family.cameras), set(reader.cameras)
    # Of what both show, the policy must have been trained to see.
    wanted = known if joins else own & known
    if wanted - there or own & there - known:
        raise UserError(_other_cameras(family, wanted, "dataset" if joins else "policy"))
    if reader.fps != family.control_rate:
        say(
            f"the dataset has {reader.fps:g} rows a second and the simulator "
            f"{family.control_rate:g} control steps: --discount, a step, is of both"
        )
    for name, shape in reader.cameras.items() if joins else ():
        if tuple(shape) != family.cameras[name]:
            sized = _has_size(family)
            by = f"--env.image_size={config.env.image_size}" if sized else "--env.options may say"
            raise UserError(
                f"the dataset's camera {name} has images of {_by(shape)}, the simulator's of "
                f"{_by(family.cameras[name])} ({by}); what is rolled out joins the dataset's, so "
                "they must agree"
            )
    for key, has, wants in (
        ("observation.state", reader.state_dim, family.state_size),
        ("action", reader.action_dim, family.action_size),
    ):
        if has != wants:
            raise UserError(
                f"{key} has {has} numbers in the dataset and {wants} in the simulator of "
                f"--env.type={family.name}; without one, leave out --env.type"
            )


def _other_cameras(family: EnvFamily, wanted: set[str], whose: str) -> str:
    there, needed = ", ".join(sorted(family.cameras)), ", ".join(sorted(wanted))
    if _has_size(family):
        return (
            f"--env.cameras=[{there}] are not those of the {whose}: --env.cameras=[{needed}] "
            "would be, or a --rename_map of the dataset's"
        )
    if not there:
        return f"--env.type={family.name} shows no pictures, and the {whose} has [{needed}]"
    return (
        f"--env.type={family.name} has the cameras [{there}], the {whose} [{needed}]: name the "
        "dataset's like the simulator's by --rename_map, or choose another simulator"
    )


def _has_size(family: EnvFamily) -> bool:
    """Whether the settings say which cameras there are and how large their images."""
    return family.name == "robomimic"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def push(config: FinetuneVLAConfig) -> None:
    """Pushes the run's last checkpoint to the Hub."""
    assert config.output_dir is not None
    assert config.policy.repo_id is not None, "the settings were checked"
    pushed = push_checkpoint(
        config.output_dir, config.policy.repo_id, private=config.policy.private
    )
    print(f"pushed {pushed.url}")


def _check_sizes(config: FinetuneVLAConfig, team: Team) -> None:
    """Every process needs a part of every batch and of every round of episodes."""
    parts = {
        "batch_size": config.batch_size // config.micro_batches,
        "critic.batch_size": config.critic.batch_size,
    }
    if config.online.steps:
        parts["online.episodes_per_round"] = config.online.episodes_per_round
    for flag, count in parts.items():
        if count < team.size:
            each = " for each of the micro-batches" if flag == "batch_size" else ""
            raise UserError(f"--{flag} is too small for {team.size} processes{each}")
    if team.size > 1 and config.policy.device is not None:
        raise UserError(
            f"--policy.device={config.policy.device} is for one process; the launcher gives each "
            f"of the {team.size} its own"
        )


def _check_push(config: FinetuneVLAConfig) -> None:
    """What would make the push at the end fail, told before anything is trained."""
    knobs = config.policy
    if not knobs.push_to_hub:
        return
    assert knobs.repo_id is not None, "the settings were checked"
    if not config.resume:
        check_pushed(name_of(config.method), "--policy.push_to_hub=true")
    base = knobs.path
    if base is not None and knobs.adapter == "continue":
        base = (adapter_settings(base, knobs.revision) or {}).get("base_model_name_or_path", base)
    local = base is None or Path(base).expanduser().is_dir()
    if local and config.peft.method == "lora" and not knobs.merged:
        raise UserError(f"--policy.push_to_hub=true {LOCAL_BASE}")
    check_push(knobs.repo_id, private=knobs.private)


def dataset_configs(config: FinetuneVLAConfig, packed: Path | None) -> list[LeRobotConfig]:
    """What is read of each dataset, the first first."""
    data = config.dataset
    if data.repo_id is None and packed is None:
        raise UserError(NO_PACKED)
    first = _dataset(data, data.kind, config.rename_map, data.columns)
    if data.repo_id is None and packed is not None:
        first = replace(first, repo_id="local/packed", root=packed / "dataset")
    return [first] + [
        _further(config, each, f"--dataset.more[{number}]") for number, each in enumerate(data.more)
    ]


def _further(config: FinetuneVLAConfig, data: MoreDatasetConfig, where: str) -> LeRobotConfig:
    """One of ``dataset.more``, which takes over what it does not say itself."""
    kind, columns = data.kind or config.dataset.kind, config.dataset.columns
    if data.rename_map is not None:
        own = _dataset(data, kind, data.rename_map, columns)
        return replace(own, renamed_by=f"rename_map of {where}")
    taken_over = f"--rename_map (of {where} too, unless it has its own: rename_map: {{}} is none)"
    return replace(_dataset(data, kind, config.rename_map, columns), renamed_by=taken_over)


def reward_of(config: FinetuneVLAConfig) -> RewardSpec:
    """What the critic maximises: rollouts like the first dataset, others by their own kinds."""
    data = config.dataset
    named = zip(source_names(1 + len(data.more))[1:], data.more, strict=True)
    own = {name: each.kind for name, each in named if each.kind and each.kind != data.kind}
    return RewardSpec(data.kind, own)


def _dataset(
    data: OneDatasetConfig,
    kind: RewardKind,
    rename_map: dict[str, str],
    columns: tuple[str, ...] | None,
) -> LeRobotConfig:
    own = {item.name: getattr(data, item.name) for item in fields(OneDatasetConfig)}
    own["repo_id"] = data.repo_id or ""
    return LeRobotConfig(**own, kind=kind, rename_map=rename_map, columns=columns)


def _load_policy(
    config: FinetuneVLAConfig,
    given: tuple[str, str | None],
    base_revision: str | None,
    device: torch.device,
    say: Callable[[str], None],
    family: EnvFamily | None,
) -> LeRobotFlowPolicy:
    knobs, peft = config.policy, config.peft
    lora = LoRASettings(peft.r, peft.lora_alpha, peft.target_modules)
    path, revision = given
    policy = load_policy(
        path,
        lora=lora if peft.method == "lora" else None,
        in_float32=requirements_of(config.method).trains_field,
        adapter=knobs.adapter,
        features=CriticFeatures(knobs.critic_layer, pooling=knobs.critic_pooling),
        limits=None if family is None else family.action_limits,
        device=str(device),
        revision=revision,
        base_revision=base_revision,
        tokenizer=knobs.tokenizer,
        # Merged adapters draw some too, which a run that begins anew finds merged already.
        seed=config.seed,
        say=say,
    )
    if knobs.n_action_steps is not None:
        policy.take_executed_length(knobs.n_action_steps)
    if knobs.tuned_flow_steps is not None:
        policy.take_flow_steps(knobs.tuned_flow_steps)
    assert policy.processors is not None, "load_policy brings processors"
    policy.processors.pad_instructions()
    return policy

"""From a folder or the Hub to a policy whose weights are the file's, or a sentence why not."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel
from vla_trqam.adapters.checkpoint.intake import reconcile, switch_off
from vla_trqam.adapters.checkpoint.policy_gate import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CONFIG,
    PICKLED,
    WEIGHTS,
    check_model_folder,
    check_policy_folder,
    no_foreign_code,
)
from vla_trqam.adapters.checkpoint.saving import lost_by_merging, told_of_merging
from vla_trqam.adapters.checkpoint.weights import NotDrawn, verify_adapters, verify_policy
from vla_trqam.adapters.critic_features import CriticFeatures
from vla_trqam.adapters.families.registry import check_type, family_of
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.lora import LoRASettings, check_kind, with_lora
from vla_trqam.adapters.policy_checks import check_config
from vla_trqam.adapters.processors import Limits, Processors

from vla_trqam.data.foreign import read_json
from vla_trqam.data.sources.lerobot.hub import commit_of
from vla_trqam.errors import UserError, one_line

PREPROCESSOR = "policy_preprocessor.json"
# What a training run leaves beside the policy is not needed to load it; code and pickles never are.
NOT_FETCHED = ["training_state/*", "algorithm/*", "checkpoints/*", "*.mp4", "*.py"]
NOT_FETCHED += [f"*{suffix}" for suffix in PICKLED]

TOKENIZER = "tokenizer_processor"
RENAMING = "rename_observations_processor"
"""LeRobot's names for the steps by which every supported policy tokenizes, and renames cameras."""

COMMIT = re.compile(r"[0-9a-f]{40}")

AdapterUse = Literal["merge", "continue"]


@dataclass(frozen=True)
class Checkpoint:
    """A policy on this machine.

    Attributes:
        folder: its files.
        source: the folder or the Hub repository that was asked for.
        revision: of the repository: the commit.
    """

    folder: Path
    source: str
    revision: str | None = None


def load_policy(
    path: str | Path,
    *,
    lora: LoRASettings | None = LoRASettings(),  # noqa: B008 - frozen
    in_float32: bool = False,
    adapter: AdapterUse = "merge",
    features: CriticFeatures | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    overrides: Sequence[str] = (),
    processor_overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Path | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> LeRobotFlowPolicy:
    """A policy ready to be fine-tuned, in evaluation mode, its base being the policy as loaded.

    Args:
        path: a folder as ``lerobot-train`` writes it, or a Hub repository.
        lora: the adapters to train; None trains the action expert in full.
        in_float32: an expert in half precision, trained in full, is made float32, where the host
            computes with such a one behind its prefix; LeRobot rounds it when it loads it again.
        adapter: for a checkpoint that is an adapter. ``"merge"`` makes the tuned policy of the
            checkpoint the new base; ``"continue"`` goes on training its adapters against *their*
            base (``lora`` has no effect).
        features: what the critic sees.
        limits: what the robot executes at most, in its units; None takes the range of the
            statistics' actions.
        device: where to; None takes the config's.
        revision: branch, tag or commit on the Hub.
        base_revision: the same of an adapter's base; None takes the one that the adapter names.
        overrides: fields of the policy's config as ``--name=value``, as ``lerobot-train`` takes
            them after ``--policy``.
        processor_overrides: by step name, as LeRobot's ``preprocessor_overrides``, for example
            ``{"color_processor": {"space": "rgb"}}``.
        tokenizer: folder of the tokenizer that takes the place of the preprocessor's.
        seed: of new adapters, whatever was drawn before them; None draws on.
        say: gets each thing that is set right, once.

    Raises:
        UserError: the checkpoint cannot be reached, is of a kind that cannot be fine-tuned, lacks
            processors, or its weights are not those of its config.
    """
    checkpoint = fetch(path, revision)
    config = read_config(checkpoint, device, overrides)
    switch_off(config, checkpoint.source, say)
    family = family_of(config)
    check_config(family, config)
    processors = load_processors(checkpoint, config, processor_overrides, tokenizer)
    model: PreTrainedPolicy | PeftModel
    own_flow_steps = None
    base = adapter_base(checkpoint, base_revision)
    if base is not None:
        model = _with_adapters(load_host(base, config), checkpoint, continued=adapter != "merge")
        if adapter == "merge":
            told = told_of_merging(lost_by_merging(model))
            if told is not None:
                say(
                    f"{checkpoint.source}: {told}; --policy.adapter=continue keeps them beside "
                    "their base"
                )
            model, base = _merged(model), None
        else:
            own_flow_steps = family.num_flow_steps(read_config(base))
    else:
        model, base = load_host(checkpoint, config), checkpoint
    reconcile(config, processors, checkpoint.source, say)
    if not isinstance(model, PeftModel):
        if lora is not None:
            if seed is not None:
                torch.manual_seed(seed)
            model = with_lora(model, family, lora, Path(checkpoint.source))
        elif in_float32 and family.mixes_precisions:
            _widen(model, family.trained_parts, say)
    return LeRobotFlowPolicy(
        model,
        family,
        features=features,
        processors=processors,
        source=None if base is None else base.source,
        revision=None if base is None else base.revision,
        limits=limits,
        own_flow_steps=own_flow_steps,
    )


def camera_names(path: str | Path, revision: str | None = None) -> tuple[str, ...]:
    """The cameras that a policy looks through, of which nothing but the config is read.

    Raises:
        UserError: it cannot be reached or its config read.
    """
    return tuple(read_config(fetch(path, revision)).image_features)


def flow_steps_of(path: str | Path, revision: str | None = None) -> int:
    """The number of flow steps that a policy comes with; nothing but the config is read.

    Raises:
        UserError: it cannot be reached, its config read, or a policy of its type fine-tuned.
    """
    config = read_config(fetch(path, revision))
    return family_of(config).num_flow_steps(config)


def adapter_settings(path: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a checkpoint that is an adapter; None for a whole policy.

    Raises:
        UserError: it cannot be reached or its config read.
    """
    config = fetch(path, revision).folder / ADAPTER_CONFIG
    return read_json(config) if config.is_file() else None


def fetch(path: str | Path, revision: str | None = None) -> Checkpoint:
    """The files of a folder or a Hub repository, downloaded if they are not here yet.

    Raises:
        UserError: there is neither, or a file could make a library run something.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _looked_at(Checkpoint(folder.resolve(), str(folder.resolve())))
    if folder.is_absolute() or str(path).startswith((".", "~")):
        raise UserError(f"{path} is not a folder")
    try:
        if not (constants.HF_HUB_OFFLINE or COMMIT.fullmatch(revision or "")):
            # Asked first: huggingface_hub would give an older copy where the Hub does not answer.
            HfApi().model_info(str(path), revision=revision)
        found = snapshot_download(str(path), revision=revision, ignore_patterns=NOT_FETCHED)
    except HFValidationError:
        raise UserError(f"{path} is neither a folder nor a name of the form user/policy") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{path} is not a folder here, and the Hugging Face Hub did not give it: "
            f"{type(error).__name__}: {reason[0]}"
        ) from None
    commit = commit_of(Path(found)) or revision
    return _looked_at(Checkpoint(Path(found), str(path), commit))


def _looked_at(checkpoint: Checkpoint) -> Checkpoint:
    check_policy_folder(checkpoint.folder)
    return checkpoint


def read_config(
    checkpoint: Checkpoint, device: str | None = None, overrides: Sequence[str] = ()
) -> PreTrainedConfig:
    """The policy's config.

    Raises:
        UserError: it is missing, unreadable, of a type that cannot be fine-tuned, or an override
            does not fit.
    """
    path = checkpoint.folder / CONFIG
    policy_type = read_json(path).get("type")
    if not isinstance(policy_type, str):
        raise UserError(f'{path} has no "type"; it is not the config of a LeRobot policy')
    check_type(policy_type)
    arguments = [*overrides, *([] if device is None else [f"--device={device}"])]
    try:
        return PreTrainedConfig.from_pretrained(checkpoint.folder, cli_overrides=arguments)
    except (Exception, SystemExit) as error:
        reason = f" with {' '.join(arguments)}" if arguments else ""
        raise UserError(f"{path}{reason} is not a valid config: {_one_line(error)}") from None


def load_host(checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedPolicy:
    """LeRobot's own policy by LeRobot's own loader, then verified.

    Raises:
        UserError: it cannot be built, or its weights are not the file's.
    """
    weights = checkpoint.folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{checkpoint.source} has no {WEIGHTS}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), _without_false_alarms(), no_foreign_code():
            kind = get_policy_class(config.type)
            with NotDrawn():
                host = kind.from_pretrained(str(checkpoint.folder), config=config)
    except Exception as error:
        raise UserError(
            f"LeRobot cannot load {checkpoint.source}: {type(error).__name__}: {_one_line(error)}"
        ) from None
    host.to(config.device)
    with _without_false_alarms():
        verify_policy(host, weights)
    return host.eval()


@contextlib.contextmanager
def _without_false_alarms() -> Iterator[None]:
    """LeRobot warns of two weights of every pi0; they are right, and checked."""

    def serious(record: logging.LogRecord) -> bool:
        return "Vision embedding key might need handling" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(serious)
    try:
        yield
    finally:
        root.removeFilter(serious)


def load_processors(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Path | None = None,
) -> Processors:
    """The processors and the statistics in them.

    Raises:
        UserError: they are missing or cannot be built, or statistics are missing in them.
    """
    changed: dict[str, dict[str, Any]] = {"device_processor": {"device": str(config.device)}}
    if _step(checkpoint, RENAMING) is not None:
        # As LeRobot's commands do: the map that counts is the one that is given, and by it cameras
        # have the policy's names before they come here.
        changed[RENAMING] = {"rename_map": {}}
    changed |= {key: dict(value) for key, value in (overrides or {}).items()}
    if tokenizer is not None:
        changed[TOKENIZER] = {"tokenizer_name": str(_tokenizer_folder(checkpoint, tokenizer))}
    try:
        with no_foreign_code():
            before, after = make_pre_post_processors(
                config,
                pretrained_path=str(checkpoint.folder),
                preprocessor_overrides=changed,
            )
    except Exception as error:
        if f"step '{TOKENIZER}'" in str(error):
            raise UserError(_no_tokenizer(checkpoint, tokenizer, error)) from None
        raise UserError(
            f"{checkpoint.source}: its processors (policy_preprocessor.json, "
            f"policy_postprocessor.json) cannot be loaded: {_one_line(error)}"
        ) from None
    processors = Processors(before, after)
    problems = list(processors.statistics_problems())
    if problems:
        raise UserError(f"{checkpoint.source}: statistics: " + "; ".join(problems))
    return processors


def _step(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """A step as policy_preprocessor.json has it; None where there is none of the name."""
    path = checkpoint.folder / PREPROCESSOR
    steps = read_json(path).get("steps") if path.is_file() else None
    named = [step for step in steps or () if isinstance(step, dict)]
    return next((step for step in named if step.get("registry_name") == name), None)


def _tokenizer_folder(checkpoint: Checkpoint, tokenizer: Path) -> Path:
    folder = Path(tokenizer).expanduser()
    if not folder.is_dir():
        raise UserError(f"--policy.tokenizer={tokenizer} is not a folder")
    if _step(checkpoint, TOKENIZER) is None:
        raise UserError(
            f"--policy.tokenizer={tokenizer} is for a step {TOKENIZER}, which {checkpoint.source} "
            f"does not have in its {PREPROCESSOR}: leave the flag out"
        )
    check_model_folder(folder)
    return folder.resolve()


def _no_tokenizer(checkpoint: Checkpoint, tokenizer: Path | None, error: Exception) -> str:
    reason = str(error).partition("Error: ")[2] or str(error)
    if tokenizer is not None:
        return f"--policy.tokenizer={tokenizer} holds no tokenizer: {_one_line(reason)}"
    step = _step(checkpoint, TOKENIZER) or {}
    name = (step.get("config") or {}).get("tokenizer_name")
    return (
        f"{checkpoint.source}: the tokenizer {name!r} of its {PREPROCESSOR} cannot be had; "
        f"--policy.tokenizer=FOLDER takes one of this machine ({_one_line(reason)})"
    )


def adapter_base(checkpoint: Checkpoint, revision: str | None = None) -> Checkpoint | None:
    """The base that a checkpoint adapts; None for one that is no adapter.

    Args:
        checkpoint: on this machine.
        revision: of the base on the Hub; None takes the one that the adapter names.

    Raises:
        UserError: the adapter does not name its base, or it cannot be had.
    """
    path = checkpoint.folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    fields = read_json(path)
    name = fields.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path} does not say which policy it adapts (base_model_name_or_path)")
    try:
        return fetch(name, revision or fields.get("revision"))
    except UserError as error:
        raise UserError(f"{path} adapts {name}: {error}") from None


def _with_adapters(host: PreTrainedPolicy, checkpoint: Checkpoint, *, continued: bool) -> PeftModel:
    # peft would ask the Hub for them.
    if not (checkpoint.folder / ADAPTERS).is_file():
        raise UserError(f"{checkpoint.source} has no {ADAPTERS}")
    try:
        model = PeftModel.from_pretrained(host, str(checkpoint.folder), is_trainable=True)
    except Exception as error:
        raise UserError(
            f"the adapter in {checkpoint.source} does not fit its base: {_one_line(error)}"
        ) from None
    check_kind(model, continued=continued)
    verify_adapters(model, checkpoint.folder / ADAPTERS)
    return model


def _widen(host: PreTrainedPolicy, parts: Sequence[str], say: Callable[[str], None]) -> None:
    """Weights that are trained in full get the room for small steps."""
    trained = [host.get_submodule(part) for part in parts]
    if all(p.dtype == torch.float32 for part in trained for p in part.parameters()):
        return
    for part in trained:
        part.float()
    say(
        "the action expert's weights of half precision are trained in float32; where LeRobot loads "
        "them again it rounds them to half"
    )


def _merged(model: PeftModel) -> PreTrainedPolicy:
    host: PreTrainedPolicy = model.merge_and_unload()
    host.config.use_peft = False
    return host


def _one_line(error: object) -> str:
    """What it says, and what is behind it: draccus tells what was wrong in the cause alone."""
    text = one_line(error)
    cause = one_line(getattr(error, "__cause__", None) or "")
    return (text if cause in text else f"{text} ({cause})")[:400]

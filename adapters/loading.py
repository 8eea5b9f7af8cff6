"""From a folder or the Hub to a policy whose weights are the file's, or a sentence why not."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel
from vla_trqam.adapters.critic_features import CriticFeatures
from vla_trqam.adapters.families import check_type, family_of
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy, check_config
from vla_trqam.adapters.lora import LoRASettings, check_kind, with_lora
from vla_trqam.adapters.processors import Limits, Processors
from vla_trqam.adapters.weights import verify_adapters, verify_policy

from vla_trqam.errors import UserError

WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# What a training run leaves beside the policy is not needed to load it.
NOT_FETCHED = ["training_state/*", "algorithm/*", "checkpoints/*", "*.mp4"]

AdapterUse = Literal["merge", "continue"]


@dataclass(frozen=True)
class Checkpoint:
    """A policy on this machine.

    Attributes:
        folder: its files.
        source: the folder or the Hub repository that was asked for.
        revision: of the repository.
    """

    folder: Path
    source: str
    revision: str | None = None


def load_policy(
    path: str | Path,
    *,
    lora: LoRASettings | None = LoRASettings(),  # noqa: B008 - frozen
    adapter: AdapterUse = "merge",
    features: CriticFeatures | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    overrides: Sequence[str] = (),
    processor_overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> LeRobotFlowPolicy:
    """A policy ready to be fine-tuned, in evaluation mode, its base being the policy as loaded.

    Args:
        path: a folder as ``lerobot-train`` writes it, or a Hub repository.
        lora: the adapters to train; None trains the action expert in full.
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
            ``{"tokenizer_processor": {"tokenizer_name": folder}}``.

    Raises:
        UserError: the checkpoint cannot be reached, is of a kind that cannot be fine-tuned, lacks
            processors, or its weights are not those of its config.
    """
    checkpoint = fetch(path, revision)
    config = read_config(checkpoint, device, overrides)
    family = family_of(config)
    check_config(family, config)
    model: PreTrainedPolicy | PeftModel
    source: str | None
    adapted = adapter_base(checkpoint)
    if adapted is not None:
        base = fetch(adapted[0], base_revision or adapted[1])
        model = _with_adapters(load_host(base, config), checkpoint)
        source = base.source
        if adapter == "merge":
            model, source = _merged(model), None
    else:
        model, source = load_host(checkpoint, config), checkpoint.source
    if lora is not None and not isinstance(model, PeftModel):
        model = with_lora(model, family, lora, Path(checkpoint.source))
    return LeRobotFlowPolicy(
        model,
        family,
        features=features,
        processors=load_processors(checkpoint, config, processor_overrides),
        source=source,
        limits=limits,
    )


def fetch(path: str | Path, revision: str | None = None) -> Checkpoint:
    """The files of a folder or a Hub repository, downloaded if they are not here yet.

    Raises:
        UserError: there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Checkpoint(folder.resolve(), str(folder.resolve()))
    if folder.is_absolute() or str(path).startswith((".", "~")):
        raise UserError(f"{path} is not a folder")
    try:
        found = snapshot_download(str(path), revision=revision, ignore_patterns=NOT_FETCHED)
    except HFValidationError:
        raise UserError(f"{path} is neither a folder nor a name of the form user/policy") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{path} is not a folder here, and the Hugging Face Hub did not give it: "
            f"{type(error).__name__}: {reason[0]}"
        ) from None
    return Checkpoint(Path(found), str(path), revision)


def read_config(
    checkpoint: Checkpoint, device: str | None = None, overrides: Sequence[str] = ()
) -> PreTrainedConfig:
    """The policy's config.

    Raises:
        UserError: it is missing, unreadable, of a type that cannot be fine-tuned, or an override
            does not fit.
    """
    path = checkpoint.folder / CONFIG
    policy_type = _read_json(path).get("type")
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
        with contextlib.redirect_stdout(said), _without_false_alarms():
            kind = get_policy_class(config.type)
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
) -> Processors:
    """The processors and the statistics in them.

    Raises:
        UserError: they are missing or cannot be built, or statistics are missing in them.
    """
    on_device = {"device_processor": {"device": str(config.device)}}
    try:
        before, after = make_pre_post_processors(
            config,
            pretrained_path=str(checkpoint.folder),
            preprocessor_overrides=on_device | {k: dict(v) for k, v in (overrides or {}).items()},
        )
    except Exception as error:
        raise UserError(
            f"{checkpoint.source}: its processors (policy_preprocessor.json, "
            f"policy_postprocessor.json) cannot be loaded: {_one_line(error)}"
        ) from None
    processors = Processors(before, after)
    problems = list(processors.statistics_problems())
    if problems:
        raise UserError(f"{checkpoint.source}: statistics: " + "; ".join(problems))
    return processors


def adapter_base(checkpoint: Checkpoint) -> tuple[str, str | None] | None:
    """The base that a checkpoint adapts, and its revision; None for one that is no adapter.

    Raises:
        UserError: the adapter does not name its base.
    """
    path = checkpoint.folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    fields = _read_json(path)
    if not fields.get("base_model_name_or_path"):
        raise UserError(f"{path} does not say which policy it adapts (base_model_name_or_path)")
    return fields["base_model_name_or_path"], fields.get("revision")


def _with_adapters(host: PreTrainedPolicy, checkpoint: Checkpoint) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(host, str(checkpoint.folder), is_trainable=True)
    except Exception as error:
        raise UserError(
            f"the adapter in {checkpoint.source} does not fit its base: {_one_line(error)}"
        ) from None
    check_kind(model)
    verify_adapters(model, checkpoint.folder / ADAPTERS)
    return model


def _merged(model: PeftModel) -> PreTrainedPolicy:
    host: PreTrainedPolicy = model.merge_and_unload()
    host.config.use_peft = False
    return host


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a policy folder holds {path.name}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    return fields


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]

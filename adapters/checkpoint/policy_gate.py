"""What may stand in a policy's folder, looked at before LeRobot, peft or transformers see it.

A policy of a stranger is data: JSON and safetensors. What its files name is run by nobody: no
class, no module, no code of a repository, no pickled weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vla_trqam.adapters.checkpoint.processor_gate import check_no_trust, check_processors

from vla_trqam.data.foreign import check_header, entries, read_json, shown
from vla_trqam.errors import UserError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# Fields of a policy's config by which the host loads a model or tokenizer of somebody else's.
NAMES_A_MODEL = ("vlm_model_name", "vision_encoder_name", "text_encoder_name", "tokenizer_name")
# Of a tokenizer's folder: long lists of words, which name no code.
VOCABULARIES = ("added_tokens.json", "tokenizer.json", "vocab.json")

MEGATRON = "megatron.core"
INITIALISATIONS = r"gaussian|eva|olora|pissa|pissa_niter_\d{1,3}|corda|loftq|orthogonal|lora_ga"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
LONGEST_PATTERN, MOST_STARS = 1000, 4


def check_policy_folder(folder: Path) -> None:
    """Whether a folder's files are data of the kinds that LeRobot writes for a supported policy.

    Files that are missing are left to who needs them.

    Raises:
        UserError: a file could make a library run or fetch something; the file and what in it.
    """
    named = list(_check_config(folder / CONFIG))
    if (folder / ADAPTER_CONFIG).exists():
        _check_adapter(folder / ADAPTER_CONFIG)
        _check_weights(folder, ADAPTERS)
    else:
        _check_weights(folder, WEIGHTS)
    named += check_processors(folder)
    for path in sorted(folder.glob("*.safetensors")):
        check_header(path)
    for name in named:
        check_model_folder(Path(name).expanduser())


def check_model_folder(folder: Path) -> None:
    """The same for a folder of transformers' that a policy names; a name on the Hub passes.

    Raises:
        UserError: the folder wants code to be run, or its weights are pickled.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*.json")):
        if path.name in VOCABULARIES:
            continue
        fields = read_json(path)
        check_no_trust(path, fields)
        for key, value in entries(fields):
            if key == "auto_map" and value:
                raise UserError(f"{path} names code of its own ({key}), and none is run; remove it")
            if key.endswith("attn_implementation") and "/" in str(value):
                raise UserError(f"{path}: {key} {shown(value)} would be fetched from the Hub")
    _check_weights(folder, "*.safetensors")


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """Within, transformers refuses a repository with code of its own instead of asking for leave.

    It asks at the terminal for as many seconds as this number says, and a ``y`` runs the code.
    """
    from transformers import dynamic_module_utils

    with mock.patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0):
        yield


def _check_config(path: Path) -> Iterator[str]:
    """Yields the models and tokenizers that a policy's config names."""
    if not path.exists():
        return
    fields = read_json(path)
    check_no_trust(path, fields)
    for key in NAMES_A_MODEL:
        value = fields.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{path}: {key} is {shown(value)}; it must be a name or a folder")
        yield value


def _check_weights(folder: Path, wanted: str) -> None:
    """Where the wanted file is missing, peft and transformers unpickle others."""
    if any(folder.glob(wanted)):
        return
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise UserError(
            f"{folder} has {pickled[0]} and no {wanted}, and nothing is unpickled; convert the "
            "weights to safetensors"
        )


def _check_adapter(path: Path) -> None:
    """Plain LoRA, and nothing that peft would import, fetch or search for without end."""
    fields = read_json(path)
    check_no_trust(path, fields)
    if fields.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {shown(fields.get('peft_type'))}; only plain LoRA is loaded"
        )
    for key, value in fields.items():
        if value is None or value is False or value == [] or value == {}:
            continue  # off
        if key not in ADAPTER_SETTINGS:
            raise UserError(f"{path} has {key}={shown(value)}, which plain LoRA has not")
        if not ADAPTER_SETTINGS[key](value):
            raise UserError(f"{path}: {key} is {shown(value)}, which cannot be loaded safely")


def is_safe_pattern(pattern: Any) -> bool:
    """Whether a regular expression is found or not in a time that does not explode.

    No group that is repeated, and few stars: the time is then a small power of the names' length.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        return False
    bare = re.sub(r"\\.", "_", pattern)
    stars = sum(bare.count(sign) for sign in "*+")
    if (
        stars > MOST_STARS
        or re.search(r"\)[*+{]|[{]|\(\?[^:]", bare)
        or re.search(r"\\\d", pattern)
    ):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and PLAIN_NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_pattern_or_names(value: Any) -> bool:
    return is_safe_pattern(value) or _are_names(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1_000_000


def _are_numbers_by_name(value: Any) -> bool:
    named = isinstance(value, dict) and all(map(is_safe_pattern, value))
    return named and all(map(_is_number, value.values()))


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500


def _is_true(value: Any) -> bool:
    return value is True


def _is_initialisation(value: Any) -> bool:
    return value is True or (
        isinstance(value, str) and re.fullmatch(INITIALISATIONS, value.lower()) is not None
    )


def _is_auto_mapping(value: Any) -> bool:
    # Written by peft for every policy; only its Auto classes import it, and nobody here uses these.
    known = {"base_model_class", "parent_library"}
    return isinstance(value, dict) and value.keys() <= known and all(map(_is_short, value.values()))


ADAPTER_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "alpha_pattern": _are_numbers_by_name,
    "auto_mapping": _is_auto_mapping,
    "base_model_name_or_path": _is_short,
    "bias": lambda v: v in ("none", "all", "lora_only"),
    "ensure_weight_tying": _is_true,
    "exclude_modules": _is_pattern_or_names,
    "fan_in_fan_out": _is_true,
    "inference_mode": _is_true,
    "init_lora_weights": _is_initialisation,
    "lora_alpha": _is_number,
    "lora_bias": _is_true,
    "lora_dropout": _is_number,
    "megatron_core": lambda v: v == MEGATRON,
    "modules_to_save": _are_names,
    "peft_type": _is_short,
    "peft_version": _is_short,
    "qalora_group_size": _is_number,
    "r": _is_number,
    "rank_pattern": _are_numbers_by_name,
    "revision": _is_short,
    "target_modules": _is_pattern_or_names,
    "task_type": _is_short,
    "use_dora": _is_true,
    "use_rslora": _is_true,
}
"""What may be on in the config of plain LoRA; DoRA passes here, to be refused by its name."""

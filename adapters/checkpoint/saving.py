"""Checkpoints that stock LeRobot loads: whole weights, adapters alone, adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vla_trqam.errors import UserError

ADAPTER = "default"
NOTICED_LOSS = 0.01
"""Of what adapters change, by norm; float32 loses a millionth."""


def save_adapters(
    model: PeftModel, directory: Path, base: str | None, revision: str | None = None
) -> None:
    """The adapters' weights and the path of their base, as ``lerobot-train`` writes them.

    Args:
        model: the policy with adapters.
        directory: where to.
        base: folder or Hub repository of the base; LeRobot loads it from there.
        revision: of the repository.

    Raises:
        UserError: there is no such place.
    """
    if base is None:
        raise UserError(
            "this policy's base was made in memory (adapters merged into it), so adapters alone "
            "could not be loaded again: save with merged=True, or its base by save_base"
        )
    model.peft_config[ADAPTER].base_model_name_or_path = base
    model.peft_config[ADAPTER].revision = revision
    # Looking for enlarged embeddings would ask the Hub for the base's config.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    host: PreTrainedPolicy = model.get_base_model()
    with _use_peft(host.config, True):
        host.config.save_pretrained(directory)


def save_whole(model: PreTrainedPolicy | PeftModel, directory: Path) -> None:
    """Whole weights, with the adapters merged in where there are any; memory stays as it is."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(directory)
        return
    host: PreTrainedPolicy = model.get_base_model()
    with _use_peft(host.config, False):
        host.save_pretrained(directory, state_dict=merged_state_dict(host))


def save_base(model: PeftModel, directory: Path) -> None:
    """Whole weights without the adapters, as they are with the adapters switched off."""
    host: PreTrainedPolicy = model.get_base_model()
    with _use_peft(host.config, False):
        host.save_pretrained(directory, state_dict=base_state_dict(host))


@contextmanager
def _use_peft(config: Any, value: bool) -> Iterator[None]:
    before = config.use_peft
    config.use_peft = value
    try:
        yield
    finally:
        config.use_peft = before


def base_state_dict(host: PreTrainedPolicy) -> dict[str, Tensor]:
    """The host's weights ``W`` under the names they have without adapters."""
    return {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for key, value in host.state_dict().items()
        if ".lora_" not in key and ".modules_to_save." not in key
    }


@torch.no_grad()
def lost_by_merging(host: nn.Module) -> float:
    """The share of what adapters change that the weights' precision has no room for, by norm."""
    lost = change = 0.0
    layers: list[Any] = [m for m in host.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        delta, weight = layer.get_delta_weight(ADAPTER), layer.get_base_layer().weight
        exact = weight.to(delta.dtype) + delta
        lost += float((exact - exact.to(weight.dtype)).square().sum())
        change += float(delta.square().sum())
    return (lost / change) ** 0.5 if change else 0.0


def told_of_merging(lost: float) -> str | None:
    """What one should know of adapters that are merged; None where next to nothing is lost."""
    if lost <= NOTICED_LOSS:
        return None
    return (
        "its adapters are merged into weights of half precision, in which "
        f"{lost:.0%} of what they change is lost (by norm)"
    )


@torch.no_grad()
def merged_state_dict(host: PreTrainedPolicy) -> dict[str, Tensor]:
    """The host's weights ``W + scale B A`` under the names they have without adapters.

    The weights in memory are not touched: merging and unmerging would change the base by rounding.
    """
    layers: dict[str, Any] = {
        name: m for name, m in host.named_modules() if isinstance(m, LoraLayer)
    }
    merged = {}
    for key, value in host.state_dict().items():
        owner, is_base, leaf = key.partition(".base_layer.")
        if is_base:
            if leaf == "weight":
                delta = layers[owner].get_delta_weight(ADAPTER)
                value = (value.to(delta.dtype) + delta).to(value.dtype)
            merged[f"{owner}.{leaf}"] = value
        elif ".lora_" not in key and ".original_module." not in key:
            merged[key.replace(f".modules_to_save.{ADAPTER}.", ".")] = value
    return merged

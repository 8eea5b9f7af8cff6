"""Weights that are really the file's: every key, every shape, every value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vla_trqam.errors import UserError

DRAWING = {"uniform_", "normal_", "erfinv_", "kaiming_uniform_"}
"""Methods of tensors and functions of ``nn.init``, for some of which transformers has its own."""
NAMED = 5
"""So many keys are named in a message."""


class _Key(str):
    """A key in the place of its tensor, while the host renames keys."""

    def clone(self) -> _Key:
        return self


class NotDrawn(TorchFunctionMode):
    """Inside, a module's parameters are not drawn, whose numbers a file has.

    To draw billions that are thrown away takes minutes. Until they are loaded, parameters hold what
    was in memory: only for a model that :func:`verify_policy` compares with its file.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leaves a parameter as it is where numbers would be drawn for it."""
        given = kwargs or {}
        if getattr(func, "__name__", None) in DRAWING:
            drawn = args[0] if args else given.get("tensor")
            if isinstance(drawn, nn.Parameter):
                return drawn
        return func(*args, **given)


def verify_policy(policy: PreTrainedPolicy, path: Path) -> None:
    """Compares a loaded policy with its file.

    LeRobot's loader of pi0 and pi05 prints a warning and returns a *random* model when the file is
    missing or does not fit, and the others skip keys that do not match.

    Raises:
        UserError: the file is missing or unreadable, or keys, shapes or values differ; the first
            ones are named.
    """
    with _opened(path) as file:
        names = _renamed(policy, file.keys())
        _compare(path, file, names, policy.state_dict())


def verify_adapters(model: PeftModel, path: Path) -> None:
    """The same for an adapter and its ``adapter_model.safetensors``."""
    with _opened(path) as file:
        names = {key: key for key in file.keys()}
        _compare(path, file, names, get_peft_model_state_dict(model, save_embedding_layers=False))


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a policy's weights are in a file of that name")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def _renamed(policy: PreTrainedPolicy, keys: Iterable[str]) -> dict[str, str]:
    """From names in the policy to names in the file; pi0's host knows those of older ports."""
    keys = list(keys)
    rename = getattr(policy, "_fix_pytorch_state_dict_keys", None)
    if rename is None:
        return {key: key for key in keys}
    fixed = rename({key: _Key(key) for key in keys}, policy.config)
    return {k if k.startswith("model.") else f"model.{k}": str(v) for k, v in fixed.items()}


def _compare(path: Path, file: Any, names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    present = {state[key].data_ptr() for key in names.keys() & state.keys()}
    # Of tied weights the file holds one.
    missing = [k for k, v in state.items() if k not in names and v.data_ptr() not in present]
    extra = [names[key] for key in names if key not in state]
    if missing or extra:
        raise UserError(
            f"{path} does not hold this policy's weights: missing {_few(missing)}, "
            f"unknown {_few(extra)}"
        )
    shapes = {key: tuple(file.get_slice(name).get_shape()) for key, name in names.items()}
    wrong = [key for key, shape in shapes.items() if shape != tuple(state[key].shape)]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{path}: {names[first]} has shape {shapes[first]}, the config says "
            f"{tuple(state[first].shape)}" + (f"; so do {_few(wrong[1:])}" if wrong[1:] else "")
        )
    different = [
        key for key, name in names.items() if not _equal(file.get_tensor(name), state[key])
    ]
    if different:
        raise UserError(
            f"{path}: the loaded policy has other values, or values that are not finite, in "
            f"{_few(different)}"
        )


def _equal(stored: Tensor, loaded: Tensor) -> bool:
    there = stored.to(loaded)
    return torch.equal(there, loaded) and _finite(there)


def _finite(values: Tensor) -> bool:
    """By the least and the greatest, which are NaN where one is: a single pass, nothing copied."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    return all(math.isfinite(bound) for bound in values.aminmax())


def _few(keys: list[str]) -> str:
    rest = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return "[" + ", ".join(keys[:NAMED]) + "]" + rest

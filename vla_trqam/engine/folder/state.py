"""A method's weights and its optimizer's moments, as named tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.methods.base import Method
from vla_trqam.methods.parts.parallel import shard_like, whole_tensor


def module_tensors(method: Method, *, own: bool = False) -> dict[str, Tensor]:
    """Every weight of a method under ``<module>.<key>``; ``own``: only of what this process has.

    Shards are put together: without ``own`` every process asks.
    """
    return {
        f"{name}.{key}": whole_tensor(value.detach()).contiguous()
        for name, module in method.modules().items()
        if not own or name in method.own_modules
        for key, value in module.state_dict().items()
    }


def load_module_tensors(
    method: Method, tensors: Mapping[str, Tensor], *, without: Collection[str] = ()
) -> None:
    """Restores :func:`module_tensors`; modules in ``without`` stay as they are.

    Raises:
        UserError: a key belongs to no module.
        RuntimeError: a module lacks a key, or has it in another shape.
    """
    modules = {name: part for name, part in method.modules().items() if name not in without}
    known = {*modules, *without}
    strange = sorted(key for key in tensors if key.partition(".")[0] not in known)
    if strange:
        raise UserError(f"{strange[0]} is a weight of none of {', '.join(modules)}")
    for name, module in modules.items():
        prefix = f"{name}."
        mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        own = module.state_dict()
        parts = {k: shard_like(own[k], v) if k in own else v for k, v in mine.items()}
        module.load_state_dict(parts, strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts under ``<parameter number>.<name>``; every process asks."""
    return {
        f"{number}.{key}": whole_tensor(value.detach()).contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores :func:`optimizer_tensors`.

    Raises:
        UserError: there is no such parameter, or it has another shape.
    """
    parameters = list(_parameters(optimizer))
    optimizer.state.clear()  # a parameter that had not moved yet has none
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        if int(number) >= len(parameters):
            raise UserError(f"{name} is the state of none of the {len(parameters)} parameters")
        parameter = parameters[int(number)]
        if value.dim() and value.shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
            )
        # Adam keeps its step counts where its moments are when fused.
        own = value.to(parameter.device)
        optimizer.state[parameter][key] = shard_like(parameter, own) if value.dim() else own


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])

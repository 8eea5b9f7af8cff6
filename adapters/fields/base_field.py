"""The base field of a policy inside a host library: LoRA switched off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class AdaptersOff(nn.Module):
    """The base is the model with its adapters switched off: no weight exists twice.

    Not for two threads at once, nor around a checkpointed forward pass whose recomputation happens
    after the context: the switch is a flag in the modules.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        # In a list, so that the model is not registered a second time.
        self._host = [model.get_base_model()]
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [[m for m in model.modules() if isinstance(m, kinds)]]

    @contextmanager
    def host(self) -> Iterator[PreTrainedPolicy]:
        """The host policy, its adapters off inside the context."""
        (layers,) = self._layers
        # The flag alone: enable_adapters also visits every weight to set requires_grad, which
        # costs as much as a small layer, and a layer that is off does not use its weights.
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield self._host[0]
        finally:
            for layer in layers:
                layer._disable_adapters = False


class FrozenCopy(nn.Module):
    """The base is a frozen deep copy of the parts that train; all other modules are shared."""

    def __init__(self, host: nn.Module, parts: Sequence[str]) -> None:
        super().__init__()
        copies = {part: copy.deepcopy(host.get_submodule(part)) for part in parts}
        self.parts = nn.ModuleList(module.requires_grad_(False) for module in copies.values())
        # In a list, so that the shared modules are not registered a second time.
        self._host = [_with_modules(host, copies)]

    @contextmanager
    def host(self) -> Iterator[PreTrainedPolicy]:
        """The host policy with the frozen parts in place."""
        yield self._host[0]


def _with_modules(root: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A twin of ``root`` that shares every module but these (by dotted name) and their parents."""
    twin = copy.copy(root)
    twin.__dict__["_modules"] = dict(root._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in replacements.items():
        child, _, rest = path.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = module
        else:
            twin._modules[child] = module
    for child, nested in below.items():
        twin._modules[child] = _with_modules(root.get_submodule(child), nested)
    return twin


BaseField = AdaptersOff | FrozenCopy

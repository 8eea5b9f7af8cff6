"""Weights of our networks under the names and in the layout of golden files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from goldens.golden_file import GoldenFile
from vla_trqam.critic import CriticEnsemble, EnsembleLayerNorm
from vla_trqam.methods.parts.entropy import Temperature
from vla_trqam.networks import MLP, TanhGaussian

Networks = Mapping[str, nn.Module]
"""By the file's name."""


def named_weights(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every weight under the file's key and in its layout (kernels are (in, out))."""
    if isinstance(module, Temperature):
        return [(f"{prefix}/log_value", module.log_value)]
    if isinstance(module, TanhGaussian):
        *hidden, mean = module.trunk.layers
        pairs = [
            p for i, layer in enumerate(hidden) for p in _dense(f"{prefix}/MLP_0/Dense_{i}", layer)
        ]
        pairs += _dense(f"{prefix}/OutputDenseMean", mean)
        return pairs + _dense(f"{prefix}/OutputDenseLogStd", module.log_std)
    assert isinstance(module, MLP | CriticEnsemble)
    pairs = [
        p for i, layer in enumerate(module.layers) for p in _dense(f"{prefix}/Dense_{i}", layer)
    ]
    for i, norm in enumerate(module.norms):
        assert isinstance(norm, nn.LayerNorm | EnsembleLayerNorm)
        scale = norm.weight if isinstance(norm, nn.LayerNorm) else norm.scale
        pairs += [
            (f"{prefix}/LayerNorm_{i}/scale", scale),
            (f"{prefix}/LayerNorm_{i}/bias", norm.bias),
        ]
    return pairs


def _numbered(name: str, layers: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    return [pair for i, layer in enumerate(layers) for pair in _dense(f"{name}_{i}", layer)]


def _dense(name: str, layer: nn.Module) -> list[tuple[str, Tensor]]:
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    kernel = layer.weight.t() if isinstance(layer, nn.Linear) else layer.weight
    return [(f"{name}/kernel", kernel), (f"{name}/bias", layer.bias)]


@torch.no_grad()
def load_initial(golden: GoldenFile, networks: Networks) -> None:
    """Gives every network the file's weights before the first update."""
    for name, module in networks.items():
        for key, weight in named_weights(name, module):
            weight.copy_(golden.tensor(f"init/{key}", weight.shape))

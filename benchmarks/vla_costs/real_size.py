"""Stock pi0, pi0.5 and SmolVLA at the size their authors published, with random weights.

Nothing is fetched: the language is bytes, and SmolVLA's backbone is written from the numbers below.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import TokenizerProcessorStep
from vla_trqam.adapters.tiny.backbones import write_smolvlm
from vla_trqam.adapters.tiny.byte_tokenizer import byte_tokenizer
from vla_trqam.adapters.tiny.checkpoints import unit_stats, write_checkpoint

PALIGEMMAS: dict[str, Any] = {"pi0": PI0Config, "pi05": PI05Config}
"""Their configs have a dtype."""
REAL = (*PALIGEMMAS, "smolvla")
IMAGE_SIDE = {"pi0": 224, "pi05": 224, "smolvla": 512}
"""What the policy's own preparation makes of any image."""
SMOLVLM_TEXT = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "vocab_size": 49280,
}
SMOLVLM_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": IMAGE_SIDE["smolvla"],
    "patch_size": 16,
}
"""Of SmolVLM2-500M-Video-Instruct, as its config.json has them; four by four patches a token."""


def real_config(
    kind: str, features: dict[str, Any], folder: Path, *, device: str, dtype: str
) -> PreTrainedConfig:
    """The stock config.

    Args:
        kind: one of :data:`REAL`.
        features: input and output features.
        folder: gets SmolVLA's backbone, which must stay there.
        device: of the policy.
        dtype: "float32" or "bfloat16" of pi0 and pi0.5; SmolVLA is of both, as LeRobot makes it.
    """
    if kind in PALIGEMMAS:
        config: PreTrainedConfig = PALIGEMMAS[kind](device=device, dtype=dtype, **features)
        return config
    backbone = folder / "smolvlm"
    write_smolvlm(backbone, SMOLVLM_TEXT, SMOLVLM_VISION, scale_factor=4, dtype=torch.bfloat16)
    return SmolVLAConfig(
        device=device, vlm_model_name=str(backbone), load_vlm_weights=True, **features
    )


def write_real_checkpoint(config: Any, features: dict[str, Any], folder: Path) -> Path:
    """Weights, config and processors as ``lerobot-train`` writes them, made on their device."""
    tokenizer = folder.with_name("tokenizer")
    byte_tokenizer().save_pretrained(tokenizer)
    module = f"lerobot.policies.{config.type}.processor_{config.type}.TokenizerProcessorStep"
    statistics = unit_stats(features)
    with (
        torch.device(config.device),
        mock.patch(module, partial(_own_tokenizer, str(tokenizer))),
    ):
        return write_checkpoint(config, statistics, folder)


def _own_tokenizer(tokenizer: str, **fields: Any) -> TokenizerProcessorStep:
    """The published one cannot be had without a Hub."""
    return TokenizerProcessorStep(**(fields | {"tokenizer_name": tokenizer}))

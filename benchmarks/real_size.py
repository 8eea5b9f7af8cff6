"""Stock pi0, pi0.5 and SmolVLA at the size their authors published, with random weights.

Nothing is fetched: the language is bytes, and SmolVLA's backbone is written from the numbers below.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import TokenizerProcessorStep
from vla_trqam.adapters.tiny.backbones import write_smolvlm
from vla_trqam.adapters.tiny.byte_tokenizer import byte_tokenizer
from vla_trqam.adapters.tiny.checkpoints import unit_stats

STEPS_FIELD = {"smolvla": "num_steps", "multi_task_dit": "num_integration_steps"}
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
    kind: str, features: dict[str, Any], *, device: str, dtype: str, num_flow_steps: int
) -> PreTrainedConfig:
    """The stock config; SmolVLA's backbone is written to a folder of its own.

    Args:
        kind: one of :data:`REAL`.
        features: input and output features.
        device: of the policy.
        dtype: "float32" or "bfloat16" of pi0 and pi0.5; SmolVLA has bfloat16 and float32 parts.
        num_flow_steps: K.
    """
    return REAL[kind](device, dtype, features | {steps_field(kind): num_flow_steps})


def steps_field(kind: str) -> str:
    """By which a config of this kind has K."""
    return STEPS_FIELD.get(kind, "num_inference_steps")


def _with_dtype(config: Callable[..., Any], device: str, dtype: str, fields: dict[str, Any]) -> Any:
    return config(device=device, dtype=dtype, **fields)


def _smolvla(device: str, dtype: str, fields: dict[str, Any]) -> SmolVLAConfig:
    backbone = Path(tempfile.mkdtemp(prefix="smolvlm_")) / "smolvlm"
    # As LeRobot loads the published one.
    write_smolvlm(backbone, SMOLVLM_TEXT, SMOLVLM_VISION, scale_factor=4, dtype=torch.bfloat16)
    return SmolVLAConfig(
        device=device, vlm_model_name=str(backbone), load_vlm_weights=True, **fields
    )


REAL: dict[str, Callable[[str, str, dict[str, Any]], Any]] = {
    "pi0": partial(_with_dtype, PI0Config),
    "pi05": partial(_with_dtype, PI05Config),
    "smolvla": _smolvla,
}


def write_real_checkpoint(
    config: PreTrainedConfig, features: dict[str, Any], folder: Path, device: str
) -> Path:
    """Weights, config and processors as ``lerobot-train`` writes them, made on ``device``."""
    tokenizer = folder.with_name("tokenizer")
    byte_tokenizer().save_pretrained(tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        policy = get_policy_class(config.type)(config)
    policy.save_pretrained(folder)
    module = f"lerobot.policies.{config.type}.processor_{config.type}.TokenizerProcessorStep"
    with mock.patch(module, partial(_own_tokenizer, str(tokenizer))):
        for processor in make_pre_post_processors(config, dataset_stats=unit_stats(features)):
            processor.save_pretrained(folder)
    return folder


def _own_tokenizer(tokenizer: str, **fields: Any) -> TokenizerProcessorStep:
    """The published one cannot be had without a Hub."""
    return TokenizerProcessorStep(**(fields | {"tokenizer_name": tokenizer}))

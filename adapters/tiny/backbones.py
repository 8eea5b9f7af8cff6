"""Folders with random vision-language backbones, for the stock types that load one by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPModel,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
)
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from vla_trqam.adapters.tiny.byte_tokenizer import NUM_BYTES, byte_tokenizer

# The names by which SmolVLM's processor asks its tokenizer for them.
_SMOLVLM_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def write_tiny_smolvlm(
    folder: Path, *, width: int = 64, depth: int = 2, image_size: int = 32, seed: int = 0
) -> Path:
    """A SmolVLM with random weights; give the folder as ``vlm_model_name`` of stock ``smolvla``.

    Args:
        folder: where to write; SmolVLA's ``config.json`` will hold this path, so it must stay.
        width: of the language model (a multiple of 16).
        depth: its layers.
        image_size: side of the square images; a patch has 8 pixels, four patches become a token.
        seed: of the weights.
    """
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 16,
        "num_key_value_heads": max(width // 32, 1),
        "head_dim": 16,
    }
    vision = {
        "hidden_size": width // 2,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 8,
    }
    return write_smolvlm(folder, text, vision, scale_factor=2, seed=seed)


def write_smolvlm(
    folder: Path,
    text: dict[str, Any],
    vision: dict[str, Any],
    *,
    scale_factor: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A SmolVLM of any size with random weights, whose tokens are bytes.

    Args:
        folder: where to write.
        text: fields of the language model's config; without ``vocab_size`` it has the tokenizer's.
        vision: fields of the vision model's.
        scale_factor: so many patches, squared, become a token.
        dtype: of the weights.
        seed: of the weights.
    """
    tokenizer: Any = byte_tokenizer(*_SMOLVLM_TOKENS.values())
    language = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: Any = AutoConfig.for_model(
        "smolvlm",
        text_config=language | text,
        vision_config=vision,
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = SmolVLMForConditionalGeneration(config)
        model.to(dtype).save_pretrained(folder)
    for name, token in _SMOLVLM_TOKENS.items():
        setattr(tokenizer, name, token)
    size = {"longest_edge": vision["image_size"]}
    SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=size),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size),
    ).save_pretrained(folder)
    _name_special_tokens(folder / "tokenizer_config.json")
    return folder


def _name_special_tokens(path: Path) -> None:
    """As a dict the extra tokens become attributes of the loaded tokenizer, as a list not."""
    fields = json.loads(path.read_text())
    fields["extra_special_tokens"] = _SMOLVLM_TOKENS
    path.write_text(json.dumps(fields, indent=2))


def write_tiny_clip(
    folder: Path, *, width: int = 32, image_size: int = 32, max_length: int = 32, seed: int = 0
) -> Path:
    """A CLIP with random weights, for stock ``multi_task_dit``.

    Args:
        folder: where to write; LeRobot wants its name to contain ``clip``.
        width: of both encoders (a multiple of 2).
        image_size: side of the square images; a patch has 8 pixels.
        max_length: tokens of a prompt, bytes here.
        seed: of the weights.
    """
    tokenizer: Any = byte_tokenizer()
    shared = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": width,
    }
    text = {
        "vocab_size": NUM_BYTES + 3,
        "max_position_embeddings": max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": image_size, "patch_size": 8}
    config: Any = AutoConfig.for_model(
        "clip", text_config=shared | text, vision_config=shared | vision, projection_dim=width
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

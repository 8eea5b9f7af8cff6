"""The widths of a tiny PaliGemma with its action expert, and the modules of these widths."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.policies.pi_gemma import (
    PaliGemmaForConditionalGenerationWithPiGemma,
    PiGemmaForCausalLM,
)
from transformers import AutoConfig
from vla_trqam.adapters.tiny.byte_tokenizer import NUM_BYTES

VOCABULARY = NUM_BYTES + 3
NUM_HEADS = 8
"""Fixed: the stock attention reshapes to 8 heads."""


@dataclass
class TinySizes:
    """Beside the fields of the stock config.

    Attributes:
        vlm_width, vlm_mlp_dim: of the language model.
        expert_width, expert_mlp_dim: of the action expert.
        depth: layers of both; the expert reads the language model's cache layer by layer.
        head_dim: of both, for each of the 8 heads.
        vision_width, vision_mlp_dim, vision_depth: of the image encoder.
        patch_size: of its patches; an image becomes ``(resolution / patch_size)^2`` tokens.
    """

    vlm_width: int = 64
    vlm_mlp_dim: int = 128
    expert_width: int = 64
    expert_mlp_dim: int = 128
    depth: int = 2
    head_dim: int = 16
    vision_width: int = 32
    vision_mlp_dim: int = 64
    vision_depth: int = 1
    patch_size: int = 8


def paligemma(sizes: TinySizes, image_size: int) -> PaliGemmaForConditionalGenerationWithPiGemma:
    """The vision-language model, with random weights."""
    text = {
        "hidden_size": sizes.vlm_width,
        "intermediate_size": sizes.vlm_mlp_dim,
        "num_attention_heads": NUM_HEADS,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.depth,
        "num_key_value_heads": 1,
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": VOCABULARY,
        "model_type": "gemma",
        "dtype": "float32",
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp_dim,
        "num_hidden_layers": sizes.vision_depth,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": sizes.patch_size,
        "projection_dim": sizes.vlm_width,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
        "model_type": "siglip_vision_model",
        "dtype": "float32",
    }
    return PaliGemmaForConditionalGenerationWithPiGemma(
        AutoConfig.for_model(
            "paligemma",
            text_config=text,
            vision_config=vision,
            projection_dim=sizes.vlm_width,
            image_token_index=VOCABULARY,
        )
    )


def action_expert(sizes: TinySizes, *, time_in_norms: bool) -> PiGemmaForCausalLM:
    """The action expert, with random weights."""
    expert = PiGemmaForCausalLM(
        AutoConfig.for_model(
            "gemma",
            head_dim=sizes.head_dim,
            hidden_size=sizes.expert_width,
            intermediate_size=sizes.expert_mlp_dim,
            num_attention_heads=NUM_HEADS,
            num_hidden_layers=sizes.depth,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            hidden_activation="gelu_pytorch_tanh",
            dtype="float32",
            use_adarms=time_in_norms,
            adarms_cond_dim=sizes.expert_width if time_in_norms else None,
        )
    )
    expert.model.embed_tokens = None
    return expert

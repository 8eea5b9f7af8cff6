"""``tiny_pi0``: the config of pi0 with free widths."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from vla_trqam.adapters.tiny.sizes import TinySizes


@PreTrainedConfig.register_subclass("tiny_pi0")
@dataclass
class TinyPI0Config(TinySizes, PI0Config):
    """pi0's config; ``paligemma_variant`` and ``action_expert_variant`` have no effect."""

    chunk_size: int = 8
    n_action_steps: int = 8
    max_state_dim: int = 24
    max_action_dim: int = 8
    image_resolution: tuple[int, int] = (32, 32)
    tokenizer_max_length: int = 24

"""``tiny_pi05``: the config of pi05 with free widths."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from vla_trqam.adapters.tiny.sizes import TinySizes


@PreTrainedConfig.register_subclass("tiny_pi05")
@dataclass
class TinyPI05Config(TinySizes, PI05Config):
    """pi05's config; ``paligemma_variant`` and ``action_expert_variant`` have no effect.

    A byte is a token, so the prompt, state included, is long: 4 tokens a state dimension.
    """

    chunk_size: int = 8
    n_action_steps: int = 8
    max_state_dim: int = 24
    max_action_dim: int = 8
    image_resolution: tuple[int, int] = (32, 32)
    tokenizer_max_length: int = 160

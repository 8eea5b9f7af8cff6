"""The processors of pi05 with a tokenizer that needs no file."""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import PolicyProcessorPipeline, RelativeActionsProcessorStep
from vla_trqam.adapters.tiny.byte_tokenizer import ByteTokenizerProcessorStep
from vla_trqam.adapters.tiny.configuration_tiny_pi05 import TinyPI05Config
from vla_trqam.adapters.tiny.modules import make_processors


def make_tiny_pi05_pre_post_processors(
    config: TinyPI05Config, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """In the stock order, the state normalised before it is text; found by this name."""

    def ordered(steps: Any, relative: RelativeActionsProcessorStep) -> list[Any]:
        tokens = ByteTokenizerProcessorStep(max_length=config.tokenizer_max_length)
        return [
            steps.rename_observations,
            steps.add_batch_dim,
            relative,
            steps.normalize,
            Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
            tokens,
            steps.to_device,
        ]

    return make_processors(config, dataset_stats, ordered)

"""The processors of pi0 with a tokenizer that needs no file."""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import PolicyProcessorPipeline, RelativeActionsProcessorStep
from vla_trqam.adapters.tiny.byte_tokenizer import ByteTokenizerProcessorStep
from vla_trqam.adapters.tiny.configuration_tiny_pi0 import TinyPI0Config
from vla_trqam.adapters.tiny.modules import make_processors


def make_tiny_pi0_pre_post_processors(
    config: TinyPI0Config, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """In the stock order; found by LeRobot by this name."""

    def ordered(steps: Any, relative: RelativeActionsProcessorStep) -> list[Any]:
        tokens = ByteTokenizerProcessorStep(max_length=config.tokenizer_max_length)
        return [
            steps.rename_observations,
            steps.add_batch_dim,
            Pi0NewLineProcessor(),
            tokens,
            steps.to_device,
            relative,
            steps.normalize,
        ]

    return make_processors(config, dataset_stats, ordered)

"""The processors of pi05 with a tokenizer that needs no file."""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from vla_trqam.adapters.tiny.byte_tokenizer import ByteTokenizerProcessorStep
from vla_trqam.adapters.tiny.configuration_tiny_pi05 import TinyPI05Config


def make_tiny_pi05_pre_post_processors(
    config: TinyPI05Config, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """In the stock order (the state is normalised before it becomes text); found by this name."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    before = [
        steps.rename_observations,
        steps.add_batch_dim,
        relative,
        steps.normalize,
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
        ByteTokenizerProcessorStep(max_length=config.tokenizer_max_length),
        steps.to_device,
    ]
    absolute = AbsoluteActionsProcessorStep(
        enabled=config.use_relative_actions, relative_step=relative
    )
    return make_policy_processor_pipelines(
        input_steps=before, output_steps=[steps.unnormalize, absolute, steps.to_cpu]
    )

"""What tiny_pi0 and tiny_pi05 share: the stock classes' own state, over small modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from torch import nn
from vla_trqam.adapters.tiny.sizes import action_expert, paligemma


class TinyPaliGemmaWithExpert(nn.Module):
    """Before the stock class in a subclass's bases: its constructor alone is another."""

    time_in_norms: ClassVar[bool]

    def __init__(self: Any, config: Any) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder = config.freeze_vision_encoder
        self.train_expert_only = config.train_expert_only
        self.paligemma = paligemma(config, config.image_resolution[0])
        self.gemma_expert = action_expert(config, time_in_norms=self.time_in_norms)
        self.to_bfloat16_for_selected_params(config.dtype)
        self._set_requires_grad()


class TinyFlow(nn.Module):
    """The same for the flow model; what a family has beside the projections it adds itself."""

    with_expert: ClassVar[type[TinyPaliGemmaWithExpert]]

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rtc_processor = None
        self.gradient_checkpointing_enabled = False
        self.paligemma_with_expert = self.with_expert(config)
        self.action_in_proj = nn.Linear(config.max_action_dim, config.expert_width)
        self.action_out_proj = nn.Linear(config.expert_width, config.max_action_dim)


class TinyPolicy(nn.Module):
    """The same for the policy."""

    flow: ClassVar[type[TinyFlow]]

    def __init__(self: Any, config: Any, **_: Any) -> None:
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.rtc_processor = None
        self.model = self.flow(config)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()


def make_processors(
    config: Any,
    dataset_stats: dict[str, dict[str, Any]] | None,
    ordered: Callable[[Any, RelativeActionsProcessorStep], Sequence[Any]],
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Both processors of a policy."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    absolute = AbsoluteActionsProcessorStep(
        enabled=config.use_relative_actions, relative_step=relative
    )
    return make_policy_processor_pipelines(
        input_steps=list(ordered(steps, relative)),
        output_steps=[steps.unnormalize, absolute, steps.to_cpu],
    )

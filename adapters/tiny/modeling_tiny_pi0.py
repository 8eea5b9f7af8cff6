"""``tiny_pi0``: the stock forward code of pi0 over small modules; only constructors differ."""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn
from vla_trqam.adapters.tiny.configuration_tiny_pi0 import TinyPI0Config
from vla_trqam.adapters.tiny.sizes import action_expert, paligemma


class _TinyPaliGemmaWithExpert(PaliGemmaWithExpertModel):
    def __init__(self, config: TinyPI0Config) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder = config.freeze_vision_encoder
        self.train_expert_only = config.train_expert_only
        self.paligemma = paligemma(config, config.image_resolution[0])
        self.gemma_expert = action_expert(config, time_in_norms=False)
        self.to_bfloat16_for_selected_params(config.dtype)
        self._set_requires_grad()


class _TinyPI0Pytorch(PI0Pytorch):
    def __init__(self, config: TinyPI0Config) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rtc_processor = None
        self.gradient_checkpointing_enabled = False
        self.paligemma_with_expert = _TinyPaliGemmaWithExpert(config)
        width = config.expert_width
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)


class TinyPI0Policy(PI0Policy):
    """pi0, small."""

    config_class = TinyPI0Config
    name = "tiny_pi0"

    def __init__(self, config: TinyPI0Config, **_: Any) -> None:
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.rtc_processor = None
        self.model = _TinyPI0Pytorch(config)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()

"""``tiny_pi0``: the stock forward code of pi0 over small modules; only constructors differ."""

from __future__ import annotations

from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from torch import nn
from vla_trqam.adapters.tiny.configuration_tiny_pi0 import TinyPI0Config
from vla_trqam.adapters.tiny.modules import TinyFlow, TinyPaliGemmaWithExpert, TinyPolicy


class _WithExpert(TinyPaliGemmaWithExpert, PaliGemmaWithExpertModel):
    time_in_norms = False


class _Flow(TinyFlow, PI0Pytorch):
    with_expert = _WithExpert

    def __init__(self, config: TinyPI0Config) -> None:
        super().__init__(config)
        width = config.expert_width
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)


class TinyPI0Policy(TinyPolicy, PI0Policy):
    """pi0, small."""

    config_class = TinyPI0Config
    name = "tiny_pi0"
    flow = _Flow

"""``tiny_pi05``: the stock forward code of pi05 over small modules; only constructors differ."""

from __future__ import annotations

from lerobot.policies.pi05.modeling_pi05 import PaliGemmaWithExpertModel, PI05Policy, PI05Pytorch
from torch import nn
from vla_trqam.adapters.tiny.configuration_tiny_pi05 import TinyPI05Config
from vla_trqam.adapters.tiny.modules import TinyFlow, TinyPaliGemmaWithExpert, TinyPolicy


class _WithExpert(TinyPaliGemmaWithExpert, PaliGemmaWithExpertModel):
    time_in_norms = True


class _Flow(TinyFlow, PI05Pytorch):
    with_expert = _WithExpert

    def __init__(self, config: TinyPI05Config) -> None:
        super().__init__(config)
        width = config.expert_width
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)


class TinyPI05Policy(TinyPolicy, PI05Policy):
    """pi05, small."""

    config_class = TinyPI05Config
    name = "tiny_pi05"
    flow = _Flow

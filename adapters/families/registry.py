"""Which LeRobot policies have a velocity field that this toolkit can fine-tune, and why not."""

from __future__ import annotations

import importlib
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from vla_trqam.adapters.families.base import FlowFamily
from vla_trqam.adapters.families.multi_task_dit import MultiTaskDiTFamily
from vla_trqam.adapters.families.pi0 import PI0Family, PI05Family
from vla_trqam.adapters.families.smolvla import SmolVLAFamily

from vla_trqam.errors import UserError

FAMILIES: dict[type[PreTrainedConfig], type[FlowFamily]] = {
    PI0Config: PI0Family,
    PI05Config: PI05Family,
    SmolVLAConfig: SmolVLAFamily,
    MultiTaskDiTConfig: MultiTaskDiTFamily,
}

# Registered by being imported.
OWN_TYPES = {
    "tiny_pi0": "vla_trqam.adapters.tiny.configuration_tiny_pi0",
    "tiny_pi05": "vla_trqam.adapters.tiny.configuration_tiny_pi05",
}

NOT_A_FLOW = "it has no flow: there is no velocity field to fine-tune"
NO_ADAPTER = "it is a flow policy, but has no adapter here yet"
REFUSED = {
    "evo1": "its flow starts from uniform noise, and the method's formulas hold for Gaussian noise",
    "xvla": "it predicts the clean action, not a velocity, and its sampler is no Euler integration",
    "pi0_fast": "it writes actions as tokens; " + NOT_A_FLOW,
    "diffusion": "it is a DDPM, trained to predict noise, not a flow",
    "act": NOT_A_FLOW,
    "vqbet": NOT_A_FLOW,
    "tdmpc": NOT_A_FLOW,
    "gaussian_actor": NOT_A_FLOW,
    "groot": "its flow time is rounded to buckets, and its velocity is no function of its own",
    "eo1": "its whole language model runs in every flow step, and writes into its inputs in place",
    "vla_jepa": NO_ADAPTER,
    "molmoact2": NO_ADAPTER,
    "wall_x": NO_ADAPTER,
    "fastwam": "it denoises video and actions together on shifted schedules",
    "lingbot_va": "it denoises video and actions together on shifted schedules",
}
SUPPORTED = "pi0, pi05, smolvla, multi_task_dit (flow matching)"


def check_type(policy_type: str) -> None:
    """Makes a policy type known to LeRobot, if it is one of ours.

    Raises:
        UserError: policies of this type cannot be fine-tuned; with the reason.
    """
    if policy_type in REFUSED:
        raise UserError(
            f"a {policy_type!r} policy cannot be fine-tuned: {REFUSED[policy_type]}; "
            f"supported are {SUPPORTED}"
        )
    if policy_type in OWN_TYPES:
        importlib.import_module(OWN_TYPES[policy_type])
    if policy_type not in PreTrainedConfig.get_known_choices():
        raise UserError(
            f"LeRobot knows no policy type {policy_type!r}; supported are {SUPPORTED}. A plugin's "
            "type must be installed as a package lerobot_policy_*"
        )


def family_of(config: Any) -> FlowFamily:
    """The family of a config, also of a plugin's that inherits from a supported one.

    Raises:
        UserError: there is none.
    """
    for kind, family in FAMILIES.items():
        if isinstance(config, kind):
            return family()
    raise UserError(
        f"a {config.type!r} policy cannot be fine-tuned: no adapter knows it; supported are "
        f"{SUPPORTED}"
    )

"""LoRA through LeRobot's own peft integration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftModel, PeftType
from vla_trqam.adapters.families.base import FlowFamily

from vla_trqam.errors import UserError

PLAIN_STARTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` by which the layer that is adapted stays as it is."""


@dataclass(frozen=True)
class LoRASettings:
    """As in ``lerobot-train --peft.*``; dropout is left out, for the policy stays in eval mode.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``; None takes ``r``.
        target_modules: names or a regular expression; None takes LeRobot's targets for the policy.
        full_training_modules: modules that are trained in full, in a copy beside the original.
    """

    r: int = 16
    lora_alpha: int | None = None
    target_modules: str | tuple[str, ...] | None = None
    full_training_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"peft.r is {self.r}; it must be at least 1")


def with_lora(
    host: PreTrainedPolicy, family: FlowFamily, settings: LoRASettings, base: Path
) -> PeftModel:
    """Puts fresh adapters into a policy; until they are trained it acts as before, to the bit.

    Raises:
        UserError: no module of the policy matches the targets.
    """
    overrides: dict[str, Any] = {"r": settings.r, "lora_alpha": settings.lora_alpha or settings.r}
    if settings.target_modules is None:
        overrides |= family.lora_overrides
    else:
        given = settings.target_modules
        overrides["target_modules"] = given if isinstance(given, str) else list(given)
    if settings.full_training_modules:
        overrides["full_training_modules"] = list(settings.full_training_modules)
    host.config.pretrained_path = base
    try:
        model = host.wrap_with_peft(peft_cli_overrides=overrides)
    except (ValueError, re.error) as error:
        raise UserError(f"peft.target_modules={settings.target_modules}: {error}") from None
    assert isinstance(model, PeftModel)
    return model


def check_kind(model: PeftModel, *, continued: bool) -> None:
    """Raises a UserError for adapters that are more than ``W + scale B A``.

    Biases that were trained can be merged; where the adapters are trained on, the frozen base is
    the model without them, which trained biases of the base's own layers would move with them, and
    which a start by the weights' own singular vectors has taken apart.
    """
    config = model.active_peft_config
    if config.peft_type != PeftType.LORA or config.use_dora:
        kind = "DoRA" if config.peft_type == PeftType.LORA else config.peft_type.value
        raise UserError(f"the adapter is of kind {kind}; only plain LoRA can be fine-tuned further")
    biases = [
        n for n in ("bias", "lora_bias") if getattr(config, n, None) not in ("none", False, None)
    ]
    start = config.init_lora_weights
    if continued and start not in PLAIN_STARTS:
        raise UserError(
            f"the adapter was begun by init_lora_weights={start}, which changes the base's own "
            "weights when it is loaded, so there is no base left to go on against: "
            "--policy.adapter=merge takes all of it into the base"
        )
    if continued and biases:
        raise UserError(
            f"the adapter trains biases too ({biases[0]}={getattr(config, biases[0])}); only its "
            "matrices can be trained on: --policy.adapter=merge takes all of it into the base"
        )

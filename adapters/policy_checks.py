"""What a LeRobot policy cannot be, or be given, each in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lerobot.utils.constants import (
    ACTION,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from peft import PeftModel
from torch import nn
from vla_trqam.adapters.cameras import cameras_of
from vla_trqam.adapters.families.base import FlowFamily, Observation

from vla_trqam.errors import UserError

RELATIVE = (
    "actions relative to the state are not supported: the critic and the replay know absolute ones"
)
"""Why a policy that puts out relative actions cannot be fine-tuned."""


def check_config(family: FlowFamily, config: Any) -> None:
    """Raises a UserError with a sentence for each setting that cannot be honoured."""
    refusals = list(family.refusals(config))
    if config.n_obs_steps != 1:
        refusals.append(
            f"n_obs_steps is {config.n_obs_steps}; only policies that see one observation (1) "
            "can be fine-tuned"
        )
    if getattr(config, "rtc_config", None) is not None:
        refusals.append(
            "rtc_config is set; real-time chunking changes the sampler, so the velocity would not "
            "be the policy: set it to null"
        )
    if getattr(config, "use_relative_actions", False):
        refusals.append(f"use_relative_actions is true; {RELATIVE}")
    if config.action_feature is None:
        refusals.append(f"output_features has no {ACTION!r}")
    refusals += _empty_flows(family, config)
    if refusals:
        raise UserError(f"config of a {config.type} policy: " + "; ".join(refusals))


def _empty_flows(family: FlowFamily, config: Any) -> Iterator[str]:
    """A sentence for each size of the flow that leaves nothing of it."""
    sizes = {"chunk length": family.chunk_shape(config)[0]}
    sizes["number of flow steps"] = family.num_flow_steps(config)
    for name, size in sizes.items():
        if size < 1:
            yield f"the {name} is {size}; it must be at least 1"


def check_adapters(family: FlowFamily, model: PeftModel) -> None:
    """Raises a UserError if an adapter lies where it would change the prefix, or none is there.

    Or if the action expert attends by torch's own module, whose weight LoRA adds itself to and
    takes itself off at every call: rounded each time, it would be no fixed base.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    inside = tuple(f"base_model.model.{part}." for part in family.trained_parts)
    outside = [name for name in names if not name.startswith(inside)]
    if outside:
        raise UserError(
            f"an adapter would train {outside[0].removeprefix('base_model.model.')}, which is not "
            "in the action expert: base and tuned policy would need a prefix each; allowed are "
            + ", ".join(family.trained_parts)
        )
    if not names:
        raise UserError("the adapter has no trainable weights")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name.startswith(inside):
            raise UserError(
                f"{name.removeprefix('base_model.model.')} is torch's nn.MultiheadAttention, which "
                "no adapter can be laid on without changing the base: take --peft.method=full, or "
                "a policy with use_rope: true"
            )


def check_observation(family: FlowFamily, observation: Observation, config: Any) -> None:
    """Raises a UserError that names the first missing input of the policy."""
    wanted = [OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK]
    cameras = cameras_of(family, config, observation)
    wanted += [] if cameras.fit else cameras.missing
    if config.robot_state_feature is not None:
        wanted.append(OBS_STATE)
    missing = [key for key in wanted if key not in observation]
    if missing:
        raise UserError(
            f"the observation has no {missing[0]!r}; it holds {sorted(observation)} (give what the "
            "policy's preprocessor returns)"
        )

"""multi_task_dit with the flow matching objective: one conditioning vector, a small transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from torch import Tensor, nn
from vla_trqam.adapters.families.base import FlowFamily, Observation, PrefixPass, rows_of_points


class MultiTaskDiTFamily(FlowFamily):
    """The host's time is tau already: 0 is noise, ``v = action - noise``; nothing is padded.

    The observation encoder (CLIP, the projection of the text) is the prefix and stays frozen. The
    critic's features are its vector without the state, and the state; there are no layers to
    choose from.
    """

    trained_parts: Sequence[str] = ("noise_predictor",)
    # By default 100: lower it, an update costs as many passes.
    steps_field = "num_integration_steps"
    # LeRobot defines no default targets for this policy.
    lora_overrides = {  # noqa: RUF012
        "target_modules": (
            r"noise_predictor\.(input_proj|output_proj"
            r"|transformer_blocks\.\d+\.(attn\.(qkv_proj|out_proj)|mlp\.(0|2)))"
        )
    }

    def refusals(self, config: Any) -> Iterator[str]:
        """Only a velocity on the linear path to a point, integrated by Euler, is supported."""
        if not config.is_flow_matching:
            yield (
                f"objective is {config.objective!r}; only 'flow_matching' has a velocity field, "
                "and that choice is made in pretraining"
            )
            return
        if config.sigma_min != 0.0:
            yield f"sigma_min is {config.sigma_min}; the memoryless noise scale needs 0"
        if config.integration_method != "euler":
            yield (
                f"integration_method is {config.integration_method!r}; the robot would execute "
                "another flow than the one that is trained: set it to 'euler'"
            )

    def chunk_shape(self, config: Any) -> tuple[int, int]:
        """``(horizon, action dimension)``."""
        return config.horizon, config.action_feature.shape[0]

    def masks_padded_steps(self, config: Any) -> bool:
        """``do_mask_loss_for_padding``."""
        return config.do_mask_loss_for_padding

    def prefix_layers(self, host: PreTrainedPolicy) -> Sequence[nn.Module]:
        """None."""
        return ()

    def prefix_width(self, host: PreTrainedPolicy) -> int:
        """The conditioning vector's, without the state."""
        encoder = host.observation_encoder
        return encoder.conditioning_dim - encoder.robot_state_dim

    def encode(self, host: PreTrainedPolicy, observation: Observation, layer: int) -> PrefixPass:
        """The conditioning vector: state, images, instruction."""
        batch = dict(observation)
        if batch[OBS_STATE].ndim == 2:
            batch[OBS_STATE] = batch[OBS_STATE].unsqueeze(1)
        if host.config.image_features:
            images = [observation[key] for key in host.config.image_features]
            batch[OBS_IMAGES] = torch.stack(images, dim=-4)
        condition = host.observation_encoder.encode(batch)
        states = condition[:, host.observation_encoder.robot_state_dim :].unsqueeze(1)
        valid = states.new_ones(states.shape[:2], dtype=torch.bool)
        return PrefixPass(condition, states, valid, (states.shape[1],))

    def velocity(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, condition: Any) -> Tensor:
        """The host's transformer."""
        return host.noise_predictor(x, tau, conditioning_vec=condition)

    def share(self, host: PreTrainedPolicy, condition: Any, points: int) -> Any:
        """The vector, once a point."""
        return condition.repeat_interleave(points, dim=0)

    def velocities(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        """The host's transformer on all points at once."""
        return host.noise_predictor(*rows_of_points(x, tau), conditioning_vec=shared).view(x.shape)

    def pack(self, condition: Any) -> dict[str, Tensor]:
        """The vector."""
        return {"vector": condition}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Any:
        """The same back."""
        return tensors["vector"]

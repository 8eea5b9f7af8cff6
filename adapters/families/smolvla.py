"""SmolVLA: a SmolVLM prefix with the state in it, and an action expert that also cross-attends."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor
from vla_trqam.adapters.critic_features import recorded_layer_input
from vla_trqam.adapters.families.base import (
    CachedPrefix,
    CachedPrefixFamily,
    Observation,
    PrefixPass,
    parts_of,
    rows_of_points,
)
from vla_trqam.adapters.families.smolvla_expert import expert_states, share_prefix


class SmolVLAFamily(CachedPrefixFamily):
    """SmolVLA.

    ``state_proj`` is a layer of the *prefix* here (it embeds the state token): training it would
    change every later key and value, and base and tuned field would need a prefix each. It stays
    frozen, and LeRobot's default LoRA targets are taken without it.
    """

    trained_parts: Sequence[str] = (
        "model.vlm_with_expert.lm_expert",
        "model.action_in_proj",
        "model.action_out_proj",
        "model.action_time_mlp_in",
        "model.action_time_mlp_out",
    )
    mixes_precisions = True
    steps_field = "num_steps"
    lora_overrides = {"exclude_modules": ["state_proj"]}  # noqa: RUF012
    # Of the masked pictures there are as many as empty_cameras says, whatever is missing.
    without_camera = "left out"

    def refusals(self, config: Any) -> Iterator[str]:
        """The Aloha conversions lie between the flow's actions and the policy's."""
        if config.adapt_to_pi_aloha:
            yield (
                "adapt_to_pi_aloha is true; its conversion of actions inside the policy is not "
                "supported: convert the dataset and set it to false"
            )
        if not config.use_cache:
            yield "use_cache is false; the prefix is computed once an observation: set it to true"

    def masks_padded_steps(self, config: Any) -> bool:
        """The host's loss is a mean over the steps that are not padding."""
        return True

    def encode(self, host: PreTrainedPolicy, observation: Observation, layer: int) -> PrefixPass:
        """Images, instruction and state through SmolVLM."""
        model = host.model
        images, image_masks = host.prepare_images(observation)
        tokens, masks = observation[OBS_LANGUAGE_TOKENS], observation[OBS_LANGUAGE_ATTENTION_MASK]
        embeddings, pad_masks, att_masks = model.embed_prefix(
            images, image_masks, tokens, masks, state=host.prepare_state(observation)
        )
        with recorded_layer_input(self.prefix_layers(host), layer) as record:
            (last, _), cache = model.vlm_with_expert.forward(
                attention_mask=make_att_2d_masks(pad_masks, att_masks),
                position_ids=torch.cumsum(pad_masks, dim=1) - 1,
                past_key_values=None,
                inputs_embeds=[embeddings, None],
                use_cache=True,
            )
        # The state's token alone begins a block, behind pictures and instruction.
        before_state = int(att_masks[0].int().argmax())
        return PrefixPass(
            CachedPrefix(pad_masks, cache),
            record[0] if record else last,
            pad_masks,
            parts_of(len(images), before_state - tokens.shape[1], pad_masks.shape[1]),
        )

    def share(self, host: PreTrainedPolicy, condition: Any, points: int) -> Any:
        """Masks, rotations, and the prefix's keys and values as the expert projects them."""
        return share_prefix(
            host.model.vlm_with_expert,
            condition.cache,
            condition.pad_masks,
            host.config.chunk_size,
            points,
        )

    def velocities(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        """The host's ``denoise_step``, with the prefix shared."""
        points, times = rows_of_points(x, tau)
        suffix, _, _ = host.model.embed_suffix(points, 1.0 - times)
        out = expert_states(host.model.vlm_with_expert, suffix, shared)
        u = host.model.action_out_proj(out[:, -host.config.chunk_size :].to(torch.float32))
        return -u.view(x.shape)

    @staticmethod
    def language_model(host: PreTrainedPolicy) -> Any:
        """SmolVLM's."""
        return host.model.vlm_with_expert.get_vlm_model().text_model

    def own_cache(self, cache: Any) -> Any:
        """A cache with the same tensors for one evaluation.

        ``denoise_step`` appends the suffix to the cache it is given and crops it off again; the
        slice that remains keeps the autograd graph of that evaluation, and a second backward pass
        over the same cache fails. Appending replaces a layer's tensors and never writes into them,
        so copies of the layer objects suffice.
        """
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]
        return own

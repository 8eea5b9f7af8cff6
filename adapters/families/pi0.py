"""pi0 and pi05: a PaliGemma prefix in a cache, and a Gemma action expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
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
from vla_trqam.adapters.families.gemma_expert import SharedPrefix, expert_states, share_prefix

_EXPERT = "model.paligemma_with_expert.gemma_expert.model"


@dataclass(frozen=True)
class _Shared:
    """The prefix as the expert's layers read it, and the suffix's other inputs row by row."""

    prefix: SharedPrefix
    suffix: dict[str, Tensor]


class PI0Family(CachedPrefixFamily):
    """pi0: the state enters with the action expert."""

    # The expert's lm_head is dead weight, so "gemma_expert" itself is not listed.
    trained_parts: Sequence[str] = (
        _EXPERT,
        "model.state_proj",
        "model.action_in_proj",
        "model.action_out_proj",
        "model.action_time_mlp_in",
        "model.action_time_mlp_out",
    )
    steps_field = "num_inference_steps"
    without_camera = "masked"

    def refusals(self, config: Any) -> Iterator[str]:
        """Everything a config of this family can say beyond the general checks is honoured."""
        yield from ()

    def masks_padded_steps(self, config: Any) -> bool:
        """The host ignores ``action_is_pad``."""
        return False

    def encode(self, host: PreTrainedPolicy, observation: Observation, layer: int) -> PrefixPass:
        """Images and instruction through PaliGemma."""
        model = host.model
        images, image_masks = host._preprocess_images(observation)
        tokens, masks = observation[OBS_LANGUAGE_TOKENS], observation[OBS_LANGUAGE_ATTENTION_MASK]
        embeddings, pad_masks, att_masks = model.embed_prefix(images, image_masks, tokens, masks)
        language_model = self.language_model(host)
        # As the host does before sampling: the additive mask is made for this implementation.
        language_model.config._attn_implementation = "eager"
        with recorded_layer_input(language_model.layers, layer) as record:
            (last, _), cache = model.paligemma_with_expert.forward(
                attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad_masks, att_masks)),
                position_ids=torch.cumsum(pad_masks, dim=1) - 1,
                past_key_values=None,
                inputs_embeds=[embeddings, None],
                use_cache=True,
            )
        states = record[0] if record else last
        length = pad_masks.shape[1]
        return PrefixPass(
            CachedPrefix(pad_masks, cache, self._suffix(host, observation)),
            states,
            pad_masks,
            parts_of(len(images), length - tokens.shape[1], length),
        )

    def share(self, host: PreTrainedPolicy, condition: Any, points: int) -> Any:
        """Masks, rotations and the state's rows; nothing here depends on trained weights."""
        # As in the host's embed_suffix: the actions see each other, pi0's state does not see them.
        blocks = (*(1 for _ in condition.suffix), host.config.chunk_size)
        prefix = share_prefix(
            host.model.paligemma_with_expert.gemma_expert.model,
            condition.cache,
            condition.pad_masks,
            blocks,
            points,
        )
        rows = {k: v.repeat_interleave(points, dim=0) for k, v in condition.suffix.items()}
        return _Shared(prefix, rows)

    def velocities(self, host: PreTrainedPolicy, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        """The host's ``denoise_step``, with the prefix shared."""
        model = host.model
        points, times = rows_of_points(x, tau)
        suffix, _, _, time_condition = model.embed_suffix(
            noisy_actions=points, timestep=1.0 - times, **shared.suffix
        )
        expert = model.paligemma_with_expert.gemma_expert.model
        out = expert_states(expert, suffix, time_condition, shared.prefix)
        # Contiguous, for torch multiplies other tensors differently by weights that train and by
        # the frozen copy's: equal fields would differ in the last bits.
        states = out[:, -host.config.chunk_size :].to(torch.float32).contiguous()
        u = model.action_out_proj(states)
        return -u.view(x.shape)

    def _suffix(self, host: PreTrainedPolicy, observation: Observation) -> dict[str, Tensor]:
        return {"state": host.prepare_state(observation)}

    @staticmethod
    def language_model(host: PreTrainedPolicy) -> Any:
        """PaliGemma's."""
        return host.model.paligemma_with_expert.paligemma.model.language_model


class PI05Family(PI0Family):
    """pi05: the state is text in the prompt, the time enters by the expert's normalisation layers.

    LeRobot's default LoRA targets, named after pi0's modules, miss pi05's ``time_mlp_in``,
    ``time_mlp_out`` and the normalisation layers; give ``target_modules`` to adapt these as well.
    """

    trained_parts = (
        _EXPERT,
        "model.action_in_proj",
        "model.action_out_proj",
        "model.time_mlp_in",
        "model.time_mlp_out",
    )

    def _suffix(self, host: PreTrainedPolicy, observation: Observation) -> dict[str, Tensor]:
        return {}

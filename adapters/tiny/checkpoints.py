"""Whole checkpoints of tiny policies: weights, config and processors, as LeRobot writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from vla_trqam.adapters.tiny.backbones import write_tiny_clip, write_tiny_smolvlm
from vla_trqam.adapters.tiny.configuration_tiny_pi0 import TinyPI0Config
from vla_trqam.adapters.tiny.configuration_tiny_pi05 import TinyPI05Config

from vla_trqam.data.frames import image_key

Stats = dict[str, dict[str, Any]]

_ALL_STATS = ("mean", "std", "min", "max", "q01", "q99")


def flow_features(
    state_dim: int, action_dim: int, cameras: tuple[str, ...] = ("top",), image_size: int = 32
) -> dict[str, dict[str, PolicyFeature]]:
    """``input_features`` and ``output_features`` of a config: state, square images, action."""
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, image_size, image_size))
    inputs = {image_key(camera): image for camera in cameras}
    state = PolicyFeature(type=FeatureType.STATE, shape=(state_dim,))
    action = PolicyFeature(type=FeatureType.ACTION, shape=(action_dim,))
    return {
        "input_features": inputs | {"observation.state": state},
        "output_features": {"action": action},
    }


def unit_stats(features: dict[str, dict[str, PolicyFeature]]) -> Stats:
    """Statistics under which every normalisation leaves numbers as they are."""
    values = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    merged = features["input_features"] | features["output_features"]
    return {
        key: {name: torch.full(_stats_shape(feature), values[name]) for name in _ALL_STATS}
        for key, feature in merged.items()
    }


def _stats_shape(feature: PolicyFeature) -> tuple[int, ...]:
    return (3, 1, 1) if feature.type is FeatureType.VISUAL else tuple(feature.shape)


def tiny_pi0_config(features: dict[str, Any], **fields: Any) -> TinyPI0Config:
    """A config of ``tiny_pi0``."""
    return TinyPI0Config(device="cpu", **features, **fields)


def tiny_pi05_config(features: dict[str, Any], **fields: Any) -> TinyPI05Config:
    """A config of ``tiny_pi05``."""
    return TinyPI05Config(device="cpu", **features, **fields)


def tiny_smolvla_config(
    features: dict[str, Any], vlm_folder: Path, *, image_size: int = 32, **fields: Any
) -> SmolVLAConfig:
    """A config of stock ``smolvla`` over a tiny SmolVLM, written if it is not there."""
    if not vlm_folder.exists():
        write_tiny_smolvlm(vlm_folder, image_size=image_size)
    small: dict[str, Any] = {
        "num_vlm_layers": 2,
        "chunk_size": 8,
        "n_action_steps": 8,
        "max_state_dim": 24,
        "max_action_dim": 8,
        "tokenizer_max_length": 24,
        "load_vlm_weights": False,
    }
    return SmolVLAConfig(
        device="cpu",
        vlm_model_name=str(vlm_folder),
        resize_imgs_with_padding=(image_size, image_size),
        **features,
        **(small | fields),
    )


def tiny_multi_task_dit_config(
    features: dict[str, Any], clip_folder: Path, *, image_size: int = 32, **fields: Any
) -> MultiTaskDiTConfig:
    """A config of stock ``multi_task_dit`` over a tiny CLIP, written if it is not there."""
    if not clip_folder.exists():
        write_tiny_clip(clip_folder, image_size=image_size)
    small: dict[str, Any] = {
        "horizon": 8,
        "n_action_steps": 8,
        "num_integration_steps": 10,
        "hidden_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "timestep_embed_dim": 32,
        "tokenizer_max_length": 32,
    }
    return MultiTaskDiTConfig(
        device="cpu",
        objective="flow_matching",
        n_obs_steps=1,
        vision_encoder_name=str(clip_folder),
        text_encoder_name=str(clip_folder),
        image_crop_shape=None,
        **features,
        **(small | fields),
    )


def write_checkpoint(
    config: PreTrainedConfig, stats: Stats, folder: Path, *, seed: int = 0
) -> Path:
    """A policy with random weights and its processors, in the format of ``lerobot-train``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = get_policy_class(config.type)(config)
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder

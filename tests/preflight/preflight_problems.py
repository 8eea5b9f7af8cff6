"""Tiny random policies and small replays for the tests of the preflight."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.rows import RowNumbers
from vla_trqam.preflight.disk import ReplayPlan

STATE, ACTION, EXECUTED, STEPS = 5, 3, 4, 8
KINDS = ("tiny_pi0", "tiny_pi05", "smolvla", "multi_task_dit")


def make_policy(kind: str = "tiny_pi0", *, lora: bool = True) -> Any:
    """A fresh policy; copying is faster than loading."""
    return copy.deepcopy(_template(kind, lora))


@cache
def _template(kind: str, lora: bool) -> Any:
    from vla_trqam.adapters.loading import load_policy
    from vla_trqam.adapters.lora import LoRASettings

    return load_policy(_checkpoint(kind), lora=LoRASettings(r=2) if lora else None)


@cache
def _checkpoint(kind: str) -> Path:
    """A random checkpoint, without the zeros of its initialisation: the time is to matter."""
    from vla_trqam.adapters.tiny.checkpoints import flow_features, unit_stats, write_checkpoint

    folder = Path(mkdtemp(prefix="preflight_"))
    features = flow_features(STATE, ACTION)
    write_checkpoint(_config(kind, features, folder), unit_stats(features), folder / kind)
    weights = load_file(folder / kind / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(weights):
        if weights[name].is_floating_point() and not bool(weights[name].any()):
            weights[name] = 0.1 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, folder / kind / "model.safetensors", metadata={"format": "pt"})
    return folder / kind


def _config(kind: str, features: dict[str, Any], folder: Path) -> Any:
    from vla_trqam.adapters.tiny import checkpoints as tiny

    small = {"chunk_size": EXECUTED, "n_action_steps": EXECUTED}
    if kind == "tiny_pi0":
        return tiny.tiny_pi0_config(features, num_inference_steps=2, **small)
    if kind == "tiny_pi05":
        return tiny.tiny_pi05_config(features, num_inference_steps=2, **small)
    if kind == "smolvla":
        return tiny.tiny_smolvla_config(features, folder / "smolvlm", num_steps=2, **small)
    small = {"horizon": EXECUTED, "n_action_steps": EXECUTED, "num_integration_steps": 2}
    return tiny.tiny_multi_task_dit_config(features, folder / "clip", **small)


def make_replay(
    path: Path,
    *,
    action_dim: int = ACTION,
    camera: str = "top",
    image: tuple[int, int, int] = (32, 32, 3),
    every: int = EXECUTED,
    steps: int = STEPS,
    success: tuple[bool, ...] = (True, False, True),
    state_scale: float = 0.5,
    action_scale: float = 0.5,
    task: str = "lift the cube",
) -> Replay:
    """Episodes of noise that fits the policy's statistics; success ends an episode."""
    generator = np.random.default_rng(0)
    replay = Replay.create(
        path, observation_dim=STATE, action_dim=action_dim, cameras={camera: image}, capacity=200
    )
    observed = np.arange(steps + 1) % every == 0
    for succeeds in success:
        images = generator.integers(0, 256, (int(observed.sum()), *image), dtype=np.uint8)
        rewards = np.zeros(steps, np.float32)
        rewards[-1] = succeeds
        episode = Episode(
            observations=state_scale * generator.normal(size=(steps + 1, STATE)).astype(np.float32),
            images={camera: images},
            observed=observed,
            actions=action_scale * generator.normal(size=(steps, action_dim)).astype(np.float32),
            rewards=rewards,
            terminated=succeeds,
            truncated=not succeeds,
            success=succeeds,
            task=task,
        )
        replay.add(episode, source="test")
    return replay


def reader_of(replay: Replay) -> Any:
    """What a dataset's reader would tell of the replay's episodes before it decodes them."""
    lengths = replay.episodes().num_steps
    last = np.cumsum(lengths + 1) - 1
    rows = RowNumbers(
        states=np.delete(replay.observations, last, axis=0),
        actions=replay.actions.copy(),
        episodes=np.arange(len(lengths)).repeat(lengths),
        frames=np.concatenate([np.arange(length) for length in lengths]),
    )
    index = replay.frame_index.rows_of_frames()
    bounds = np.concatenate([[0], last + 1])
    frames = [index[(index >= a) & (index < b)] - a for a, b in pairwise(bounds.tolist())]
    return SimpleNamespace(
        tasks=replay.tasks(),
        num_episodes=len(lengths),
        frames_of=frames.__getitem__,
        first_observation=lambda: replay.observation_at(np.array([0])),
        row_numbers=lambda: rows,
    )


def plan_of(replay: Replay, path: Path, *, next_actions: int = 2) -> ReplayPlan:
    """The replay as it was planned, in a folder of its own."""
    return ReplayPlan(
        path=path,
        steps=replay.capacity,
        frames=replay.frame_capacity,
        state_dim=STATE,
        action_dim=ACTION,
        cameras=replay.cameras,
        next_actions=next_actions,
    )

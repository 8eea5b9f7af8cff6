"""Random policies of LeRobot's kinds with LoRA, and random batches for them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import get_policy_class
from torch import Tensor
from vla_trqam.adapters.families.registry import family_of
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.lora import LoRASettings, with_lora
from vla_trqam.adapters.tiny import checkpoints as tiny

from vla_costs.real_size import IMAGE_SIDE, PALIGEMMAS, REAL, real_config
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError

TINY: dict[str, Callable[..., Any]] = {
    "pi0": tiny.tiny_pi0_config,
    "pi05": tiny.tiny_pi05_config,
    "smolvla": tiny.tiny_smolvla_config,
    "multi_task_dit": tiny.tiny_multi_task_dit_config,
}
POLICIES = (*TINY, "tiny_pi0", "tiny_pi05")
STATE_DIM = 14


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        policy: one of :data:`POLICIES`.
        size: "tiny" or "full".
        device: "cpu", "cuda" or "meta".
        dtype: of the transformer, "float32" or "bfloat16" (pi0 and pi05).
        batch_size: B.
        cameras: of the observation.
        num_flow_steps: K.
        lora_rank: of LeRobot's default targets (and ours for multi_task_dit).
    """

    policy: str
    size: str
    device: str
    dtype: str
    batch_size: int
    cameras: int
    num_flow_steps: int
    lora_rank: int

    def __post_init__(self) -> None:
        if self.size == "full" and self.kind not in REAL:
            raise UserError(
                f"--size=full is there for {', '.join(REAL)}; {self.kind} is built around a "
                "backbone from a folder, and only the tiny one is packaged"
            )
        if self.dtype != "float32" and self.kind not in PALIGEMMAS:
            raise UserError(f"--dtype={self.dtype}: the config of {self.kind} has no dtype")
        if self.policy.startswith("tiny_") and self.size == "full":
            raise UserError(f"--policy={self.policy} has one size: leave --size=full out")
        if self.device == "meta" and self.kind not in PALIGEMMAS:
            raise UserError(f"--device=meta counts the work of {' and '.join(PALIGEMMAS)} only")
        for name in ("batch_size", "cameras", "num_flow_steps", "lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def kind(self) -> str:
        """The policy without its size."""
        return self.policy.removeprefix("tiny_")

    @property
    def action_dim(self) -> int:
        """Of an action: as many as the policies pad to.

        A selection by mask has no shape where there are no numbers (device ``meta``).
        """
        return 32 if self.size == "full" else 8

    @property
    def image_size(self) -> int:
        """Side of the square images."""
        return IMAGE_SIDE[self.kind] if self.size == "full" else 32


def make_policy(setup: Setup) -> LeRobotFlowPolicy:
    """A policy with random weights and fresh adapters, in memory only."""
    torch.manual_seed(0)
    cameras = tuple(f"camera{i}" for i in range(setup.cameras))
    features = tiny.flow_features(STATE_DIM, setup.action_dim, cameras, setup.image_size)
    config = _config(setup, features)
    config.device = setup.device
    family = family_of(config)
    setattr(config, family.steps_field, setup.num_flow_steps)
    with torch.device(setup.device):
        host = get_policy_class(config.type)(config)
    # peft wants to know where the weights came from; nothing is read or written there.
    model = with_lora(host, family, LoRASettings(r=setup.lora_rank), Path("random"))
    return LeRobotFlowPolicy(model.to(setup.device), family)


def _config(setup: Setup, features: dict[str, Any]) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="vla_update_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if setup.size == "full":
        return real_config(setup.kind, features, folder, device="cpu", dtype=setup.dtype)
    if setup.kind in PALIGEMMAS:
        small = {"chunk_size": 8, "n_action_steps": 8, "dtype": setup.dtype}
        return TINY[setup.kind](features, **small)
    return TINY[setup.kind](features, folder / "clip_or_smolvlm")


def make_observation(policy: LeRobotFlowPolicy, setup: Setup, seed: int) -> dict[str, Tensor]:
    """What a preprocessor returns, random: a third of the instruction's tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    config, rows = policy.host.config, setup.batch_size
    length = config.tokenizer_max_length
    images = {
        key: torch.rand(rows, *feature.shape, generator=generator)
        for key, feature in config.image_features.items()
    }
    mask = (torch.arange(length) < 2 * length // 3).expand(rows, length).clone()
    observation = images | {
        "observation.state": torch.randn(rows, STATE_DIM, generator=generator),
        "observation.language.tokens": torch.randint(0, 256, (rows, length), generator=generator),
        "observation.language.attention_mask": mask,
    }
    return {key: value.to(setup.device) for key, value in observation.items()}


def make_batch(
    policy: LeRobotFlowPolicy,
    observation: dict[str, Tensor],
    next_observation: dict[str, Tensor],
    action: Tensor,
) -> TransitionBatch[Any]:
    """Transitions that neither end nor are cut."""
    rows, length, _ = action.shape
    never = torch.zeros(rows, dtype=torch.bool, device=action.device)
    return TransitionBatch(
        observation=observation,
        action=policy.pad_action(action),
        chunk_return=torch.zeros(rows, device=action.device),
        next_observation=next_observation,
        discount=torch.full((rows,), 0.95, device=action.device),
        terminated=never,
        truncated=never,
        valid=torch.ones(rows, length, dtype=torch.bool, device=action.device),
    )


def cloning_batch(
    policy: LeRobotFlowPolicy, observation: dict[str, Tensor], action: Tensor
) -> dict[str, Tensor]:
    """The batch of ``lerobot-train``."""
    batch = dict(observation, action=action)
    if policy.host.config.type == "multi_task_dit":  # its dataset reader adds a time axis
        batch["observation.state"] = batch["observation.state"].unsqueeze(1)
    return batch

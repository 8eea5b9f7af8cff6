"""The contract over LeRobot policies: tiny random checkpoints, asked through LeRobot's own API."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import torch
from contract import BATCH, FlowPolicyContract
from torch import Tensor
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings
from vla_trqam.adapters.tiny import checkpoints as tiny

from vla_trqam.policy import FlowPolicy

STATE, ACTION = 5, 3
CAMERAS = ("top", "wrist")
FEATURES = tiny.flow_features(STATE, ACTION, CAMERAS)
FAMILIES = ("tiny_pi0", "tiny_pi05", "smolvla", "multi_task_dit")
SMALL = {"chunk_size": 5, "n_action_steps": 5}
# Four Euler steps: K only multiplies the time a test takes.
MAKE = {
    "tiny_pi0": lambda _: tiny.tiny_pi0_config(FEATURES, num_inference_steps=4, **SMALL),
    "tiny_pi05": lambda _: tiny.tiny_pi05_config(
        FEATURES, num_inference_steps=4, tokenizer_max_length=64, **SMALL
    ),
    "smolvla": lambda folder: tiny.tiny_smolvla_config(
        FEATURES, folder / "smolvlm", num_steps=4, **SMALL
    ),
    # As over published weights: LeRobot loads the backbone, and builds the expert, in bfloat16.
    "smolvla_bfloat16": lambda folder: tiny.tiny_smolvla_config(
        FEATURES, folder / "smolvlm", num_steps=4, load_vlm_weights=True, **SMALL
    ),
    "multi_task_dit": lambda folder: tiny.tiny_multi_task_dit_config(
        FEATURES, folder / "clip", horizon=5, n_action_steps=5, num_integration_steps=4
    ),
    # Its attention is torch's own module.
    "multi_task_dit_absolute": lambda folder: tiny.tiny_multi_task_dit_config(
        FEATURES,
        folder / "clip",
        horizon=5,
        n_action_steps=5,
        num_integration_steps=4,
        use_rope=False,
        use_positional_encoding=True,
    ),
}


def statistics() -> tiny.Stats:
    """Statistics that move every number, so that a missing normalisation is seen."""
    stats = tiny.unit_stats(FEATURES)
    for names in stats.values():
        for name in ("mean", "min", "q01"):
            names[name] = names[name] - 0.3
        names["std"] = names["std"] * 1.7
    return stats


@cache
def checkpoint(kind: str) -> Path:
    """A random checkpoint, written once a process."""
    folder = Path(mkdtemp(prefix="tiny_policies_"))
    tiny.write_checkpoint(MAKE[kind](folder), statistics(), folder / kind)
    _stir(folder / kind)
    return folder / kind


def _stir(folder: Path) -> None:
    """Random values also where the initialisation puts zeros, lest half the model be idle."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(weights):
        if weights[name].is_floating_point() and not bool(weights[name].any()):
            weights[name] = 0.1 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@cache
def _template(kind: str, lora: bool) -> LeRobotFlowPolicy:
    return load_policy(checkpoint(kind), lora=LoRASettings(r=4) if lora else None)


def make_policy(kind: str, *, lora: bool) -> LeRobotFlowPolicy:
    """A fresh policy; copying is faster than loading."""
    torch.manual_seed(5)
    return copy.deepcopy(_template(kind, lora))


def raw_observation(batch_size: int, seed: int) -> dict[str, Any]:
    """As an environment gives it: images in [0, 1], state in its units, instructions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    batch: dict[str, Any] = {
        f"observation.images.{camera}": torch.rand(batch_size, 3, 32, 32, generator=generator)
        for camera in CAMERAS
    }
    batch["observation.state"] = torch.rand(batch_size, STATE, generator=generator) - 0.5
    batch["task"] = [("lift", "lift the cube", "go")[i % 3] for i in range(batch_size)]
    return batch


def observation(kind: str, batch_size: int = BATCH, seed: int = 0) -> dict[str, Any]:
    processors = _template(kind, True).processors
    assert processors is not None
    return processors.observe(raw_observation(batch_size, seed))


@contextmanager
def host_draws(host: Any, noise: Tensor, tau: Tensor | None = None) -> Iterator[None]:
    """Lets the host draw this noise and these times wherever it draws any."""
    draws: list[tuple[Any, str, Tensor | None]]
    if host.config.type == "multi_task_dit":
        draws = [
            (torch, "randn", noise),
            (torch, "randn_like", noise),
            (host.objective, "_sample_timesteps", tau),
        ]
    else:
        time = None if tau is None else 1.0 - tau
        draws = [(host.model, "sample_noise", noise), (host.model, "sample_time", time)]
    with ExitStack() as stack:
        for owner, name, value in draws:
            stack.enter_context(mock.patch.object(owner, name, return_value=value))
        yield


@contextmanager
def counted_evaluations(policy: LeRobotFlowPolicy) -> Iterator[Counter[str]]:
    """What is asked of each field along a path, in batches of states."""
    counts: Counter[str] = Counter()
    inside: list[bool] = []
    host, velocities = policy.base.host, policy.family.velocities

    @contextmanager
    def base_host() -> Iterator[Any]:
        inside.append(True)
        with host() as found:
            yield found
        inside.pop()

    def counted(model: Any, x: Tensor, tau: Tensor, shared: Any) -> Tensor:
        counts["base" if inside else "tuned"] += x.shape[1]
        return velocities(model, x, tau, shared)

    with (
        mock.patch.object(policy.base, "host", base_host),
        mock.patch.object(policy.family, "velocities", counted),
    ):
        yield counts


def host_chunk(host: Any, observation: dict[str, Any], noise: Tensor) -> Tensor:
    """What the robot is given step by step, normalised: (B, H, a)."""
    host.reset()
    with host_draws(host, noise):
        steps = [host.select_action(dict(observation)) for _ in range(noise.shape[1])]
    return torch.stack(steps, dim=1)


def host_loss(
    host: Any,
    observation: dict[str, Any],
    action: Tensor,
    noise: Tensor,
    tau: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The loss of ``lerobot-train``."""
    batch = dict(observation, action=action)
    if valid is not None:
        batch["action_is_pad"] = ~valid
    if host.config.type == "multi_task_dit":  # its dataset reader gives observations a time axis
        batch["observation.state"] = batch["observation.state"].unsqueeze(1)
    with host_draws(host, noise, tau):
        return host.forward(batch)[0]


class LeRobotContract(FlowPolicyContract):
    """The networks compute in float32 wherever they are told to, and so do the differences here."""

    difference_step, difference_rtol, difference_atol = 2e-3, 2e-2, 2e-3
    kind: str
    lora: bool

    def make_policy(self) -> LeRobotFlowPolicy:
        return make_policy(self.kind, lora=self.lora)

    def observation(self, batch_size: int, seed: int) -> dict[str, Any]:
        return observation(self.kind, batch_size, seed)

    @contextmanager
    def evaluations(self, policy: FlowPolicy) -> Iterator[Counter[str]]:
        assert isinstance(policy, LeRobotFlowPolicy)
        with counted_evaluations(policy) as counts:
            yield counts

    def host_actions(self, policy: FlowPolicy, observation: Any, noise: Tensor) -> Tensor:
        assert isinstance(policy, LeRobotFlowPolicy)
        return host_chunk(policy.host, observation, noise)

    def behaviour_loss(
        self, policy: FlowPolicy, observation: Any, action: Tensor, noise: Tensor, tau: Tensor
    ) -> Tensor:
        assert isinstance(policy, LeRobotFlowPolicy)
        context = policy.encode(observation)
        return policy.behaviour_loss(context, policy.real_actions(action), noise, tau)

    def host_behaviour_loss(
        self, policy: FlowPolicy, observation: Any, action: Tensor, noise: Tensor, tau: Tensor
    ) -> Tensor:
        assert isinstance(policy, LeRobotFlowPolicy)
        return host_loss(policy.host, observation, policy.real_actions(action), noise, tau)

    def load(self, directory: Path) -> LeRobotFlowPolicy:
        return load_policy(directory, lora=LoRASettings(r=4) if self.lora else None)

    def in_precision(self, policy: FlowPolicy, observation: Any) -> tuple[FlowPolicy, Any]:
        return policy, observation

    @property
    def reload_is_exact(self) -> bool:  # type: ignore[override]
        """Merging an adapter rounds."""
        return not self.lora

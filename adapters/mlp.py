"""A plain MLP flow policy for state observations: ``v(s, x, tau) = MLP(concat(s, x, tau))``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vla_trqam.adapters.velocity_mlp import MLPFlowConfig, MLPPathFields, VelocityMLP

from vla_trqam.critic import ema_update
from vla_trqam.data.foreign import check_header, read_json
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import by_kernels
from vla_trqam.policy import FlowPolicy, PathFields

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SAVED = ("tuned.", "observation_")

__all__ = ["MLPFlowConfig", "MLPFlowPolicy", "VelocityMLP"]


def _join(features: Tensor, x: Tensor, tau: Tensor) -> Tensor:
    return torch.cat([features, x.flatten(1), tau.unsqueeze(1)], dim=1)


class MLPFlowPolicy(FlowPolicy):
    """A flow policy over flat observations; the context is the normalised observation.

    Args:
        config: the shape.
        observation_mean: (O,), subtracted from observations.
        observation_std: (O,), positive; divides them.
    """

    def __init__(
        self,
        config: MLPFlowConfig,
        observation_mean: Tensor | None = None,
        observation_std: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self._own_flow_steps = config.num_flow_steps
        size = config.observation_dim
        mean = torch.zeros(size) if observation_mean is None else observation_mean.float()
        std = torch.ones(size) if observation_std is None else observation_std.float()
        for name, value in (("observation_mean", mean), ("observation_std", std)):
            if value.shape != (size,):
                raise UserError(f"{name} has shape {tuple(value.shape)}; expected ({size},)")
        if not bool((std > 0).all()):
            raise UserError("observation_std has entries that are not positive")
        self.observation_mean: Tensor
        self.observation_std: Tensor
        self.register_buffer("observation_mean", mean.clone())
        self.register_buffer("observation_std", std.clone())
        self.tuned = VelocityMLP(config)
        self.base = copy.deepcopy(self.tuned).requires_grad_(False)
        self.behaviour: VelocityMLP | None = None

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """``(H, A)``."""
        return self.config.chunk_length, self.config.action_dim

    @property
    def executed_length(self) -> int:
        """n, by the config; H where it names none."""
        return self.config.n_action_steps or self.config.chunk_length

    def take_executed_length(self, count: int) -> None:
        """In the config, which is saved."""
        self.config = replace(self.config, n_action_steps=count)

    @property
    def num_flow_steps(self) -> int:
        """K."""
        return self.config.num_flow_steps

    @property
    def own_flow_steps(self) -> int:
        """K of the config that the policy was made with."""
        return self._own_flow_steps

    def take_flow_steps(self, count: int) -> None:
        """In the config, which is saved."""
        self.config = replace(self.config, num_flow_steps=count)

    @property
    def feature_dim(self) -> int:
        """O."""
        return self.config.observation_dim

    def encode(self, observation: Tensor) -> Tensor:
        """Normalises: (B, O) -> (B, O)."""
        return (observation - self.observation_mean) / self.observation_std

    def features(self, context: Tensor) -> Tensor:
        """The normalised observation, (B, O)."""
        return context

    def velocity(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        """``v_theta``: x (B, H, A), tau (B,) -> (B, H, A)."""
        return self.tuned(_join(context, x, tau)).view_as(x)

    def base_velocity(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        """``v_base``: x (B, H, A), tau (B,) -> (B, H, A)."""
        return self.base(_join(context, x, tau)).view_as(x)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The tuned network's."""
        return self.tuned.parameters()

    def start_base_training(self) -> None:
        """The base is from now on the EMA of a network that keeps training by behaviour cloning."""
        self.behaviour = copy.deepcopy(self.base).requires_grad_(True)

    def behaviour_parameters(self) -> Iterator[nn.Parameter]:
        """The training base's."""
        return iter(()) if self.behaviour is None else self.behaviour.parameters()

    def behaviour_velocity(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        """The training base's field: x (B, H, A), tau (B,) -> (B, H, A)."""
        if self.behaviour is None:
            return super().behaviour_velocity(x, tau, context)
        return self.behaviour(_join(context, x, tau)).view_as(x)

    def update_base(self, rate: float) -> None:
        """``base <- (1 - rate) base + rate behaviour``."""
        if self.behaviour is not None:
            ema_update(self.base.parameters(), self.behaviour.parameters(), rate)

    def reset_base(self) -> None:
        """Makes the present tuned field the base."""
        self.base.load_state_dict(self.tuned.state_dict())

    def path_fields(
        self, context: Tensor, next_context: Tensor, *, keep_activations: bool = True
    ) -> PathFields:
        """By the kernel all evaluations of a step in few products, their activations kept."""
        if not (keep_activations and by_kernels()):
            return super().path_fields(context, next_context, keep_activations=keep_activations)
        return MLPPathFields(self.tuned, self.base, context, next_context, self.num_flow_steps)

    def save_pretrained(self, directory: Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (tuned field and normalisation)."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in self.state_dict().items() if k.startswith(SAVED)}
        save_file(tensors, directory / WEIGHTS_NAME)
        config = {"type": "mlp_flow", **asdict(self.config)}
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        """Reads :meth:`save_pretrained`'s files; tuned and base field are both the saved one.

        Raises:
            UserError: a file is missing or unreadable, or its keys or shapes are not the config's.
        """
        config = read_shape(Path(directory))
        path = Path(directory) / WEIGHTS_NAME
        tensors = _read_weights(path)
        _check_weights(path, tensors, _saved_shapes(config))
        policy = cls(config)
        policy.load_state_dict(tensors, strict=False)
        policy.reset_base()
        return policy


def read_shape(directory: Path) -> MLPFlowConfig:
    """What a saved policy's ``config.json`` says, without its weights.

    Raises:
        UserError: it is missing, unreadable, or of another kind of policy.
    """
    path = directory / CONFIG_NAME
    fields = read_json(path)
    if fields.pop("type", None) != "mlp_flow":
        raise UserError(f'{path}: "type" is not "mlp_flow"; this is not an MLP flow policy')
    try:
        return MLPFlowConfig(**{**fields, "hidden_dims": tuple(fields["hidden_dims"])})
    except (TypeError, KeyError, UserError) as error:
        raise UserError(f"{path} does not describe an MLP flow policy: {error}") from None


def _saved_shapes(config: MLPFlowConfig) -> dict[str, torch.Size]:
    """Of the saved tensors; nothing is allocated for them."""
    with torch.device("meta"):
        tuned = VelocityMLP(config).state_dict()
    shapes = {f"tuned.{name}": value.shape for name, value in tuned.items()}
    vectors = ("observation_mean", "observation_std")
    return shapes | dict.fromkeys(vectors, torch.Size([config.observation_dim]))


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a policy folder holds {WEIGHTS_NAME}")
    check_header(path)
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def _check_weights(path: Path, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise UserError(
            f"{path} has other weights than its config: missing {missing}, extra {extra}"
        )
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise UserError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}; the config says "
                f"{tuple(shape)}"
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise UserError(f"{path}: {key} has a number that is not finite")
    if not bool((tensors["observation_std"] > 0).all()):
        raise UserError(f"{path}: observation_std has a number that is not positive")

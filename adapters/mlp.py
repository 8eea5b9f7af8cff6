"""A plain MLP flow policy for state observations.

The network is ``v(s, x, tau) = MLP(concat(s, x, tau))`` with tanh-GELU and optional layer
normalisation after it. Its pullback and its gradient over a recorded path are written out by hand
on stacked activations: the numbers of autograd, without a second forward pass and without the
overhead of small operations (``tests/adapters`` holds them against autograd).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla_trqam.critic import ema_update
from vla_trqam.errors import UserError
from vla_trqam.gelu import tanh_gelu, tanh_gelu_and_slope
from vla_trqam.policy import FlowPolicy, Pullback, VelocityRecord

LAYER_NORM_EPS = 1e-6
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SAVED = ("tuned.", "observation_")


@dataclass(frozen=True)
class MLPFlowConfig:
    """The shape of an :class:`MLPFlowPolicy`; its ``config.json``.

    Attributes:
        observation_dim: O.
        action_dim: A.
        chunk_length: H.
        hidden_dims: widths of the hidden layers.
        layer_norm: normalise after every activation.
        num_flow_steps: K, the Euler steps of the policy's own sampler.
    """

    observation_dim: int
    action_dim: int
    chunk_length: int
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = False
    num_flow_steps: int = 10


@dataclass
class Tape:
    """Activations of N evaluations, kept for gradients: one entry a hidden layer.

    Attributes:
        inputs: what every layer multiplies, (N, width) each; the first is ``concat(s, x, tau)``.
        slopes: the activations' derivatives, (N, width) each.
        normed: what every layer norm got, its mean and its reciprocal deviation.
    """

    inputs: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    normed: list[tuple[Tensor, ...]] = field(default_factory=list)

    def rows(self, start: int, stop: int) -> Tape:
        """A view of some of the evaluations."""
        return Tape(
            [t[start:stop] for t in self.inputs],
            [t[start:stop] for t in self.slopes],
            [tuple(t[start:stop] for t in entry) for entry in self.normed],
        )

    @staticmethod
    def concatenate(tapes: Sequence[Tape]) -> Tape:
        """One tape of all evaluations, in order."""
        return Tape(
            [torch.cat(parts) for parts in zip(*(t.inputs for t in tapes), strict=True)],
            [torch.cat(parts) for parts in zip(*(t.slopes for t in tapes), strict=True)],
            [
                tuple(torch.cat(column) for column in zip(*entries, strict=True))
                for entries in zip(*(t.normed for t in tapes), strict=True)
            ],
        )


class VelocityMLP(nn.Module):
    """The field's network over flattened chunks."""

    def __init__(self, config: MLPFlowConfig) -> None:
        super().__init__()
        out_dim = config.chunk_length * config.action_dim
        widths = [config.observation_dim + out_dim + 1, *config.hidden_dims]
        layers = [nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], out_dim], strict=True)]
        norms = [nn.LayerNorm(w, eps=LAYER_NORM_EPS) for w in widths[1:] if config.layer_norm]
        # A ModuleList forgets what it holds.
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(layers))
        self.norms = cast("Sequence[nn.LayerNorm]", nn.ModuleList(norms))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """``concat(s, x, tau)`` (N, in) -> (N, H * A)."""
        h = inputs
        for index, layer in enumerate(self.layers[:-1]):
            h = tanh_gelu(layer(h))
            if self.norms:
                h = self.norms[index](h)
        return self.layers[-1](h)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """:meth:`forward`, bit for bit, with what its gradients need."""
        tape = Tape([inputs])
        h = inputs
        for index, layer in enumerate(self.layers[:-1]):
            h, slope = tanh_gelu_and_slope(layer(h))
            tape.slopes.append(slope)
            if self.norms:
                norm = self.norms[index]
                value = h
                h, mean, rstd = torch.native_layer_norm(
                    value, norm.normalized_shape, norm.weight, norm.bias, norm.eps
                )
                tape.normed.append((value, mean, rstd))
            tape.inputs.append(h)
        return self.layers[-1](h), tape

    @torch.no_grad()
    def input_pullback(self, tape: Tape, cotangent: Tensor) -> Tensor:
        """``J^T a`` over the whole input: (N, H * A) -> (N, in)."""
        g = cotangent @ self.layers[-1].weight
        for index in reversed(range(len(tape.slopes))):
            g = self._activation_pullback(tape, index, g) @ self.layers[index].weight
        return g

    @torch.no_grad()
    def parameter_gradients(self, tape: Tape, cotangent: Tensor) -> list[Tensor]:
        """Gradients of ``<cotangent, output>`` in the order of ``self.parameters()``."""
        layers: list[Tensor] = []
        norms: list[Tensor] = []
        g = cotangent
        for index in reversed(range(len(self.layers))):
            if index < len(tape.slopes):
                g = self._activation_pullback(tape, index, g, norms)
            layers[:0] = [g.t() @ tape.inputs[index], g.sum(dim=0)]
            if index:
                g = g @ self.layers[index].weight
        return layers + norms

    def _activation_pullback(
        self, tape: Tape, index: int, g: Tensor, norm_gradients: list[Tensor] | None = None
    ) -> Tensor:
        """Back through (layer norm and) GELU; prepends the norm's gradients where asked."""
        if self.norms:
            norm = self.norms[index]
            value, mean, rstd = tape.normed[index]
            wanted = [True, norm_gradients is not None, norm_gradients is not None]
            g, *parameters = torch.ops.aten.native_layer_norm_backward(
                g, value, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, wanted
            )
            if norm_gradients is not None:
                norm_gradients[:0] = parameters
        return g.mul_(tape.slopes[index])


class _ReplayedPath(torch.autograd.Function):
    """Values computed earlier, with the gradient to the weights that produced them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, network: VelocityMLP, tape: Tape, *_: Tensor) -> Tensor:
        ctx.network, ctx.tape = network, tape
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = gradients
        flat = cotangent.reshape(-1, cotangent.shape[-2] * cotangent.shape[-1])
        return None, None, None, *ctx.network.parameter_gradients(ctx.tape, flat)


class _MLPRecord(VelocityRecord):
    """A recording whose gradient is one stacked backward pass."""

    def __init__(self, network: VelocityMLP, features: Tensor) -> None:
        self._network, self._features = network, features
        self._tapes: list[Tape] = []
        self._outputs: list[Tensor] = []

    def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
        value, tape = self._network.evaluate(_join(self._features, x, tau))
        value = value.view_as(x)
        self._tapes.append(tape)
        self._outputs.append(value)
        return value

    def stacked(self) -> Tensor:
        tape = Tape.concatenate(self._tapes)
        values = torch.stack(self._outputs)
        return _ReplayedPath.apply(values, self._network, tape, *self._network.parameters())


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
    def num_flow_steps(self) -> int:
        """K."""
        return self.config.num_flow_steps

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

    def record_velocity(self, context: Tensor) -> VelocityRecord:
        """A recording with one stacked backward pass."""
        return _MLPRecord(self.tuned, context)

    def base_pullback(self, x: Tensor, tau: Tensor, context: Tensor) -> Pullback:
        """One stacked forward pass, then one backward pass a step."""
        steps, batch = x.shape[:2]
        inputs = torch.cat(
            [
                context.repeat(steps, 1),
                x.reshape(steps * batch, -1),
                tau.repeat_interleave(batch).unsqueeze(1),
            ],
            dim=1,
        )
        _, tape = self.base.evaluate(inputs)
        start = context.shape[1]

        def pullback(step: int, cotangent: Tensor) -> Tensor:
            rows = tape.rows(step * batch, (step + 1) * batch)
            gradient = self.base.input_pullback(rows, cotangent.flatten(1))
            return gradient[:, start:-1].reshape(cotangent.shape)

        return pullback

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
        policy = cls(_read_config(Path(directory) / CONFIG_NAME))
        path = Path(directory) / WEIGHTS_NAME
        tensors = _read_weights(path)
        expected = {k: v for k, v in policy.state_dict().items() if k.startswith(SAVED)}
        _check_weights(path, tensors, expected)
        policy.load_state_dict(tensors, strict=False)
        policy.reset_base()
        return policy


def _read_config(path: Path) -> MLPFlowConfig:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a policy folder holds {CONFIG_NAME}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if fields.pop("type", None) != "mlp_flow":
        raise UserError(f'{path}: "type" is not "mlp_flow"; this is not an MLP flow policy')
    try:
        return MLPFlowConfig(**{**fields, "hidden_dims": tuple(fields["hidden_dims"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} does not describe an MLP flow policy: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a policy folder holds {WEIGHTS_NAME}")
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def _check_weights(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise UserError(
            f"{path} has other weights than its config: missing {missing}, extra {extra}"
        )
    for key, value in expected.items():
        if tensors[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}; the config says "
                f"{tuple(value.shape)}"
            )

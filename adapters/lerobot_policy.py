"""LeRobot's flow policies as two velocity fields: everything that their families share.

LeRobot's pi0, pi05 and SmolVLA integrate ``u = noise - action`` from t = 1 to t = 0; here
``tau = 1 - t`` and ``v(x, tau) = -u(x, 1 - tau)``. A family (:class:`FlowFamily`) makes that change
once and knows which public parts of the host compute the prefix and one velocity.

The flow lives in the host's normalised action space, padded to ``max_action_dim`` where the host
pads. All of it is sampled, as the host samples it: the padded dimensions feed back into the real
ones, so the SDE, the adjoint, the adjoint matching loss and the KL run in the full space. The
critic and the robot see the real dimensions only (:meth:`~vla_trqam.policy.FlowPolicy.executed`),
and so does the host's behaviour cloning loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from peft import PeftModel
from torch import Tensor, nn
from vla_trqam.adapters.cameras import Cameras, cameras_of
from vla_trqam.adapters.critic_features import (
    CriticFeatures,
    layer_index,
    mean_over_parts,
    mean_over_valid,
)
from vla_trqam.adapters.families.base import FlowFamily, Observation, PrefixPass
from vla_trqam.adapters.fields.base_field import AdaptersOff, BaseField, FrozenCopy
from vla_trqam.adapters.fields.evaluations import Evaluations
from vla_trqam.adapters.fields.path_fields import LeRobotPathFields
from vla_trqam.adapters.policy_checks import check_adapters, check_config, check_observation
from vla_trqam.adapters.processors import Limits, Processors

from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_target
from vla_trqam.policy import FlowPolicy, PathFields, Velocity
from vla_trqam.precision import tensor_cores

PACKED = "prefix."
"""Begins the keys of :meth:`LeRobotFlowPolicy.packed`."""


@dataclass(frozen=True)
class Encoding:
    """An encoded observation.

    Attributes:
        condition: of the fields.
        features: of the critic, (B, F), float32.
    """

    condition: Any
    features: Tensor


class LeRobotFlowPolicy(FlowPolicy):
    """A LeRobot policy; :func:`~vla_trqam.adapters.loading.load_policy` reads one.

    The host always computes in evaluation mode: dropout, random crops and gradient checkpointing
    (which would drop the prefix cache) stay off.

    Args:
        model: a host policy, whose :attr:`FlowFamily.trained_parts` are then trained in full
            against a frozen copy of them; or a ``PeftModel`` over one, whose adapters are trained
            and whose base is the same model with the adapters off.
        family: how to ask it.
        features: what the critic gets.
        processors: the host's pre- and postprocessor; they are saved with the policy.
        source: the folder or Hub repository from which the base weights can be loaded again; None
            where there is none, and then an adapter alone cannot be saved before :meth:`name_base`.
        revision: of the repository.
        limits: what the robot executes at most; by default the range of the statistics' actions,
            or none if they do not hold one.
        own_flow_steps: K of the base; None takes the config's. Adapters that are gone on with may
            act with another.

    Attributes:
        evaluations: how its fields are evaluated along paths.
        encoded_at_once: observations that go through the prefix together where they are
            :meth:`packed`: the pass of a large one takes a hundred megabytes for each, which its
            result does not.

    Raises:
        UserError: the config asks for what cannot be honoured, or an adapter lies in the prefix.
    """

    encoded_at_once = 8

    def __init__(
        self,
        model: PreTrainedPolicy | PeftModel,
        family: FlowFamily,
        *,
        features: CriticFeatures | None = None,
        processors: Processors | None = None,
        source: str | None = None,
        revision: str | None = None,
        limits: Limits | None = None,
        own_flow_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.family, self.processors = family, processors
        self.source, self.revision = source, revision
        self.critic_features = features or CriticFeatures()
        check_config(family, self.host.config)
        self._own_flow_steps = own_flow_steps or self.num_flow_steps
        layers = len(family.prefix_layers(self.host))
        layer = self.critic_features.layer
        self._layer = layers if layer is None else layer_index(layer, layers)
        real = self.host.config.action_feature.shape[0]
        self._action_mask: Tensor
        mask = torch.arange(self.chunk_shape[1]) < real
        self.register_buffer("_action_mask", mask, persistent=False)
        self._limits: Tensor
        unlimited = torch.tensor([-torch.inf, torch.inf]).unsqueeze(1).expand(2, real)
        found = unlimited if processors is None else processors.normalized_limits(real, limits)
        self.register_buffer("_limits", found.clone(), persistent=False)
        self.base: BaseField = self._make_base()
        trained = self.trainable_parameters()
        self.evaluations = Evaluations(family, self.host, self.base, trained)
        self.eval()

    def _make_base(self) -> BaseField:
        if isinstance(self.model, PeftModel):
            check_adapters(self.family, self.model)
            return AdaptersOff(self.model)
        self.host.requires_grad_(False)
        for part in self.family.trained_parts:
            self.host.get_submodule(part).requires_grad_(True)
        return FrozenCopy(self.host, self.family.trained_parts)

    @property
    def host(self) -> PreTrainedPolicy:
        """The host policy itself, whether or not adapters are in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained rather than the expert itself."""
        return isinstance(self.model, PeftModel)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def cameras(self, there: Collection[str]) -> Cameras:
        """What of these the policy looks through."""
        return cameras_of(self.family, self.host.config, there)

    # The shape of the flow.

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """``(H, A)``, padded dimensions included."""
        return self.family.chunk_shape(self.host.config)

    @property
    def executed_length(self) -> int:
        """``n_action_steps`` of the host's config."""
        count: int = self.host.config.n_action_steps
        return count

    def take_executed_length(self, count: int) -> None:
        """In the host's config: it executes as many, here and where it is loaded again.

        Raises:
            UserError: chunks have not so many actions.
        """
        length = self.chunk_shape[0]
        if not 1 <= count <= length:
            raise UserError(
                f"n_action_steps is {count}; the policy's chunks have {length} actions, of which "
                f"1 to {length} can be executed"
            )
        self.host.config.n_action_steps = count
        self.host.reset()  # its queue of actions has that length

    @property
    def num_flow_steps(self) -> int:
        """K, from the host's config."""
        return self.family.num_flow_steps(self.host.config)

    @property
    def own_flow_steps(self) -> int:
        """K of the base as it was loaded."""
        return self._own_flow_steps

    def take_flow_steps(self, count: int) -> None:
        """In the host's config: its sampler takes as many, here and where it is loaded again."""
        if count < 1:
            raise UserError(f"the number of flow steps is {count}; it must be at least 1")
        self.family.set_flow_steps(self.host.config, count)

    @property
    def action_mask(self) -> Tensor:
        """(A,) bool: True for the dimensions of the config's action feature."""
        return self._action_mask

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest executed number of every real dimension, normalised: (a,) each."""
        return self._limits[0], self._limits[1]

    @property
    def feature_dim(self) -> int:
        """The width of what :class:`CriticFeatures` selects."""
        wanted, state = self.critic_features, self.host.config.robot_state_feature
        width = 0 if wanted.layer is None else self.family.prefix_width(self.host)
        width *= self._num_parts
        return width + (state.shape[0] if wanted.state and state is not None else 0)

    @property
    def _num_parts(self) -> int:
        """Averages of the prefix's states that the critic sees."""
        pictures = len(self.host.config.image_features)
        return 1 if self.critic_features.pooling == "all" else 1 + pictures

    # The fields.

    @torch.no_grad()
    def encode(self, observation: Observation) -> Encoding:
        """One pass of the frozen prefix.

        Args:
            observation: what the preprocessor made of raw observations, on the policy's device;
                or raw ones with their ``task`` (no tokens yet), which are preprocessed here; or
                what :meth:`packed` made of either.

        Raises:
            UserError: an input of the policy is missing, or a camera that the host cannot do
                without.
        """
        if PACKED + "features" in observation:
            return self._unpacked(observation)
        if self.processors is not None and OBS_LANGUAGE_TOKENS not in observation:
            observation = self.processors.observe(observation)
        check_observation(self.family, observation, self.host.config)
        with tensor_cores():
            found = self.family.encode(self.host, observation, self._layer)
        parts = []
        if self.critic_features.layer is not None:
            parts.append(self._pooled(found))
        if self.critic_features.state and self.host.config.robot_state_feature is not None:
            parts.append(_last_state(observation).float().to(found.states.device))
        return Encoding(found.condition, torch.cat(parts, dim=1))

    def _pooled(self, found: PrefixPass) -> Tensor:
        if self.critic_features.pooling == "all":
            return mean_over_valid(found.states, found.valid)
        if len(found.parts) != self._num_parts:
            raise UserError(
                f"critic_pooling=parts wants every camera of the policy by itself: it has "
                f"{self._num_parts - 1}, and the prefix of this observation {len(found.parts) - 1}"
            )
        return mean_over_parts(found.states, found.valid, found.parts)

    def packed(self, observation: Observation) -> dict[str, Tensor]:
        """:meth:`encode` as tensors (B, ...), to be kept: with a frozen prefix it never changes.

        The pass takes :attr:`encoded_at_once` observations at a time, so that its memory beyond the
        result does not grow with B.

        For batches of equal length only: a preprocessor that pads instructions to the longest of
        its batch (SmolVLA's) must be told ``padding="max_length"``.

        Args:
            observation: see :meth:`encode`; pictures of raw ones may be uint8, and all may lie on
                another device.
        """
        rows = _num_rows(observation)
        found: dict[str, Tensor] = {}
        for first in range(0, rows, self.encoded_at_once):
            self._pack(observation, slice(first, first + self.encoded_at_once), rows, found)
        return found

    def _pack(
        self, observation: Observation, part: slice, rows: int, found: dict[str, Tensor]
    ) -> None:
        """Some of the rows, into what is found of all; nothing else of the pass stays."""
        encoding = self.encode(self._taken(observation, part))
        tensors = {"features": encoding.features, **self.family.pack(encoding.condition)}
        for key, value in tensors.items():
            if PACKED + key not in found:
                found[PACKED + key] = value.new_empty((rows, *value.shape[1:]))
            found[PACKED + key][part] = value

    def _taken(self, observation: Observation, rows: slice) -> dict[str, Any]:
        """Some rows on the policy's device, their pictures between 0 and 1."""
        device = self._action_mask.device
        return {key: _as_seen(entry, rows, device) for key, entry in observation.items()}

    def _unpacked(self, packed: Observation) -> Encoding:
        tensors = {
            key.removeprefix(PACKED): value
            for key, value in packed.items()
            if key.startswith(PACKED)
        }
        features = tensors.pop("features")
        # The critic alone needs no condition.
        return Encoding(self.family.unpack(tensors) if tensors else None, features)

    def features(self, context: Encoding) -> Tensor:
        """Of the critic, (B, feature_dim), float32, without gradient."""
        return context.features

    def velocity(self, x: Tensor, tau: Tensor, context: Encoding) -> Tensor:
        """``v_theta``: x (B, H, A), tau (B,) -> (B, H, A), float32 whatever the network's dtype."""
        return self.family.velocity(self.host, x, tau, context.condition).float()

    def base_velocity(self, x: Tensor, tau: Tensor, context: Encoding) -> Tensor:
        """``v_base``: x (B, H, A), tau (B,) -> (B, H, A), float32; no gradient to weights."""
        with self.base.host() as host:
            return self.family.velocity(host, x, tau, context.condition).float()

    def sampled_field(self, context: Encoding) -> Velocity:
        """Replayed where the fields' evaluations are, at as many observations as were said."""
        replayed = self.evaluations.replayed(context.condition, len(context.features))
        if replayed is None:
            return super().sampled_field(context)
        return lambda x, tau: replayed(x, tau[:1])

    def path_fields(
        self, context: Encoding, next_context: Encoding, *, keep_activations: bool = True
    ) -> PathFields:
        """Both fields along a path, what their evaluations share computed once."""
        return LeRobotPathFields(self, context, next_context, keep_activations=keep_activations)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The adapters', or the action expert's."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def to_robot(self, action: Tensor) -> Tensor:
        """What is executed of chunks (B, H, A), as the postprocessor puts it: (B, n, a)."""
        real = self.executed(action, clip=False)
        return real if self.processors is None else self.processors.to_robot(real)

    def from_robot(self, action: Tensor) -> Tensor:
        """The robot's chunks (B, H, a), normalised and padded: (B, H, A)."""
        if self.processors is not None:
            action = self.processors.normalize(ACTION, action)
        return self.pad_action(action)

    # Behaviour cloning.

    def pad_action(self, action: Tensor) -> Tensor:
        """Real dimensions (B, H, a) -> the flow's (B, H, A); zeros behind them, as in the host."""
        return F.pad(action, (0, self.chunk_shape[1] - action.shape[-1]))

    def behaviour_loss(
        self,
        context: Encoding,
        action: Tensor,
        noise: Tensor,
        tau: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The host's own training loss at this noise and these times, on the shared prefix.

        Args:
            context: of the observations.
            action: normalised actions, (B, H, a) or padded (B, H, A).
            noise: standard normal, (B, H, A).
            tau: (B,).
            valid: (B, H) bool, the complement of LeRobot's ``action_is_pad``. SmolVLA leaves the
                other steps out, multi_task_dit if ``do_mask_loss_for_padding`` says so; pi0 and
                pi05 train on them.

        Returns:
            The mean squared error of the velocity over the real dimensions, a scalar.
        """
        x_tau, target = flow_matching_target(self.pad_action(action), noise, tau)
        error = self.real_actions(self.velocity(x_tau, tau, context) - target).square()
        if valid is None or not self.family.masks_padded_steps(self.host.config):
            return error.mean()
        weight = valid.unsqueeze(-1).to(error.dtype)
        return (error * weight).sum() / (weight.sum() * error.shape[-1]).clamp_min(1.0)

    # Checkpoints.

    def save_pretrained(self, directory: Path, *, merged: bool = False) -> None:
        """Writes what stock LeRobot loads: config, weights, processors.

        Args:
            directory: where to.
            merged: with adapters, write whole weights with the adapters in them; otherwise the
                adapters alone, for the base at :attr:`source`.

        Raises:
            UserError: the adapters alone are asked for, and their base is in no file.
        """
        from vla_trqam.adapters.checkpoint.saving import save_adapters, save_whole

        directory = Path(directory)
        if isinstance(self.model, PeftModel) and not merged:
            save_adapters(self.model, directory, self.source, self.revision)
        else:
            save_whole(self.model, directory)
        if self.processors is not None:
            self.processors.save_pretrained(directory)

    @property
    def lost_by_merging(self) -> float:
        """The share of what its adapters change that merged weights have no room for, by norm."""
        from vla_trqam.adapters.checkpoint.saving import lost_by_merging

        return lost_by_merging(self.model)

    @property
    def lacks_base(self) -> bool:
        """Whether the adapters' base is in no file: loaded adapters are merged into it."""
        return isinstance(self.model, PeftModel) and self.source is None

    def save_base(self, directory: Path) -> None:
        """Writes the base, whole, in LeRobot's format; what is trained does not matter.

        It acts with :attr:`own_flow_steps`. Adapters that are saved later name it after
        :meth:`name_base`.
        """
        from vla_trqam.adapters.checkpoint.saving import save_base

        assert isinstance(self.model, PeftModel), "a base of its own is of adapters"
        taken = self.num_flow_steps
        self.take_flow_steps(self.own_flow_steps)
        try:
            save_base(self.model, directory)
        finally:
            self.take_flow_steps(taken)
        if self.processors is not None:
            self.processors.save_pretrained(directory)

    def name_base(self, directory: Path) -> None:
        """Adapters are on the base in this folder from now on, as if it had been loaded there."""
        self.source, self.revision = str(directory), None
        self.host.config.pretrained_path = directory
        self.host.name_or_path = str(directory)

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        """:func:`~vla_trqam.adapters.loading.load_policy` with its defaults."""
        from vla_trqam.adapters.loading import load_policy

        policy = load_policy(directory)
        assert isinstance(policy, cls)
        return policy


def _num_rows(observation: Observation) -> int:
    """B; what a preprocessor made has further entries, which are of no row."""
    return next(len(v) for k, v in observation.items() if k.startswith(("observation.", PACKED)))


def _as_seen(entry: Any, rows: slice, device: torch.device) -> Any:
    if isinstance(entry, list):
        return entry[rows]
    if not isinstance(entry, Tensor) or not entry.ndim:
        return entry
    moved = entry[rows].to(device)
    if moved.dtype != torch.uint8:
        return moved
    # By a tensor there: by a number a GPU multiplies with 1 / 255, which rounds otherwise.
    return moved.float() / torch.tensor(255.0, device=device)


def _last_state(observation: Observation) -> Tensor:
    """(B, S), also of (B, 1, S)."""
    state: Tensor = observation[OBS_STATE]
    return state[:, -1] if state.ndim == 3 else state

r"""Adjoint matching with a given reward: no critic is learnt, a differentiable reward is ascended.

TRQAM's update with the terminal adjoint ``-scale grad r(s, X_1)``, on chunks that the tuned chain
samples now (Domingo-Enrich et al., 2025), at the observations of the replay: neither its actions
nor its rewards are read. lambda is TRQAM's, by the dual; ``dual_step_size: 0`` fixes it, and the
optimum is ``p_base(x) exp(scale r(x) / lambda)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.foreign import check_header
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.base import Requirements
from vla_trqam.methods.parts.adjoint_matching import TRQAMLoss
from vla_trqam.methods.parts.results import CriticLossOutput
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.methods.trqam_config import TRQAMConfig
from vla_trqam.policy import Context, FlowPolicy
from vla_trqam.precision import own_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

Reward = Callable[[Tensor, Tensor], Tensor]
"""``r(features, executed)``: (B, F), (B, n, a) -> (B,), differentiable in the second."""
NETWORKS, TARGET = "algorithm/networks.safetensors", "critic.target."
"""Of a checkpoint's folder, and what its critic's target is called there."""
OF_A_CRITIC = ("td_loss", "q_mean", "q_std", "target_mean", "critic_grad_norm")


@dataclass(frozen=True)
class RewardMatchingConfig(TRQAMConfig):
    """Knobs of adjoint matching with a given reward: those of TRQAM, and the reward.

    Attributes:
        reward_path: a checkpoint's folder of an earlier run on the same base, like
            run/checkpoints/last: the mean of its critic's target is the reward.
        reward_scale: what the reward is multiplied by.
    """

    reward_path: Path | None = None
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.reward_scale < math.inf:
            raise UserError(f"reward_scale is {self.reward_scale}; it must be positive and finite")

    @property
    def adjoint_scale(self) -> float:
        """The reward's."""
        return self.reward_scale

    @property
    def lent_critics(self) -> Mapping[str, Path]:
        """See :attr:`MethodConfig.lent_critics`."""
        return {} if self.reward_path is None else {"reward_path": self.reward_path}

    def check_inputs(self) -> None:
        """See :meth:`MethodConfig.check_inputs`."""
        read_reward(self.reward_path)


class CriticReward(nn.Module):
    """The mean of an ensemble that is not trained any more.

    Args:
        ensemble: the critic.
    """

    def __init__(self, ensemble: CriticEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble.requires_grad_(False)

    @property
    def num_inputs(self) -> int:
        """Features and numbers of a chunk that it sees."""
        return int(self.ensemble.layers[0].weight.shape[1])

    def forward(self, features: Tensor, executed: Tensor) -> Tensor:
        """(B, F), (B, n, a) -> (B,)."""
        values: Tensor = self.ensemble(features, executed)
        return values.mean(dim=0)


def read_reward(folder: Path | None) -> CriticReward:
    """The critic of a checkpoint as a reward; its shape is that of its weights.

    Raises:
        UserError: none was named, it is no checkpoint's folder, or it holds no critic.
    """
    if folder is None:
        raise UserError(
            "--method.type=reward_matching needs --method.reward_path, a checkpoint's folder of "
            "an earlier run, like run/checkpoints/last, whose critic is the reward"
        )
    path = folder / NETWORKS
    if not path.is_file():
        raise UserError(
            f"--method.reward_path={folder} has no {NETWORKS}: it must be a checkpoint's folder of "
            "an earlier run, like run/checkpoints/last"
        )
    check_header(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    prefix = {k.removeprefix(TARGET): v for k, v in tensors.items() if k.startswith(TARGET)}
    return CriticReward(_ensemble_of(prefix, path))


def _ensemble_of(weights: Mapping[str, Tensor], path: Path) -> CriticEnsemble:
    layers = [weights[k] for k in sorted(weights, key=_number) if re.fullmatch(LAYER, k)]
    if len(layers) < 2 or any(layer.ndim != 3 for layer in layers):
        raise UserError(f"{path} holds no critic: the run of that checkpoint learnt none")
    count, width, _ = layers[0].shape
    ensemble = CriticEnsemble(
        width,
        0,
        [w.shape[2] for w in layers[:-1]],
        count,
        layer_norm=any("norm" in k for k in weights),
    )
    try:
        ensemble.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} holds a critic of another kind: {reason}") from None
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise UserError(f"{path}: its critic has a number that is not finite")
    return ensemble


LAYER = r"layers\.(\d+)\.weight"


def _number(key: str) -> int:
    found = re.fullmatch(LAYER, key)
    return int(found[1]) if found else -1


class RewardLoss(TRQAMLoss):
    """TRQAM's, with the reward's slope in place of the critic's, and no TD."""

    wants_next = False

    def __init__(
        self, policy: FlowPolicy, critic: Critic, config: RewardMatchingConfig, reward: Reward
    ) -> None:
        super().__init__(policy, critic, config)
        self.reward = reward

    def critic_terms(
        self,
        batch: TransitionBatch,
        features: Tensor,
        next_context: Context,
        next_action: Tensor | None,
    ) -> CriticLossOutput:
        """Nothing is learnt of the replay's rewards."""
        nothing = features.new_zeros((1, len(features)))
        return CriticLossOutput(nothing.sum(), nothing.sum(), nothing, nothing[0])

    def terminal_adjoint(
        self, features: Tensor, x_1: Tensor, spare: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Minus the slope of the scaled reward of what is executed."""
        with torch.enable_grad():
            point = x_1.detach().requires_grad_(True)
            reward = self.reward(features, self.policy.executed(point))
            if reward.shape != x_1.shape[:1] or not reward.requires_grad:
                raise UserError(
                    f"the reward of {len(x_1)} chunks has shape {tuple(reward.shape)}"
                    f"{'' if reward.requires_grad else ' and no gradient to them'}; it must be "
                    f"({len(x_1)},) and differentiable in the executed chunk"
                )
            with own_precision(point):
                (gradient,) = torch.autograd.grad(reward.sum(), point)
        return -self.config.adjoint_scale * gradient, {"reward_mean": reward.detach().mean()}


class RewardMatching(TRQAM):
    """See the module.

    Args:
        policy: the policy.
        critic: of the run, which is left as it is.
        config: every knob.
        accelerator: see :class:`TRQAM`.
        shard: see :class:`TRQAM`.
        reward: what is maximised; None for the critic that the knobs name.

    Raises:
        UserError: there is no reward, or it sees other numbers than the policy has.
    """

    requirements = Requirements(
        trains_field=True, next_actions=False, host_acts=True, paths=True, learns_critic=False
    )
    config: RewardMatchingConfig
    loss: RewardLoss

    def __init__(
        self,
        policy: FlowPolicy,
        critic: Critic,
        config: RewardMatchingConfig,
        accelerator: Accelerator | None = None,
        *,
        shard: bool = False,
        reward: Reward | None = None,
    ) -> None:
        self._reward = reward or _fitting(read_reward(config.reward_path), policy, config)
        if isinstance(self._reward, nn.Module):
            self._reward.to(next(critic.parameters()).device)
        super().__init__(policy, critic, config, accelerator, shard=shard)

    def make_loss(self) -> RewardLoss:
        """With the reward."""
        return RewardLoss(self.policy, self.critic, self.config, self._reward)

    def update_critic(self, batch: TransitionBatch[Any], generator: torch.Generator) -> None:
        """There is none to update.

        Raises:
            ValueError: always.
        """
        raise ValueError("adjoint matching with a given reward learns no critic")

    def metrics(self) -> dict[str, float]:
        """The update's own and the trust region's; of a critic nothing."""
        return {k: v for k, v in super().metrics().items() if k not in OF_A_CRITIC}

    def critic_metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def modules(self) -> Mapping[str, nn.Module]:
        """The policy (and its average), and the reward where it is a network."""
        kept = {k: v for k, v in super().modules().items() if k != "critic"}
        return kept | ({"reward": self._reward} if isinstance(self._reward, nn.Module) else {})

    def score(self, features: Tensor, action: Tensor) -> Tensor:
        """The reward of executed chunks: features (B, F), action (B, n, a) -> (B,)."""
        with torch.no_grad():
            return self._reward(features, action)


def _fitting(
    reward: CriticReward, policy: FlowPolicy, config: RewardMatchingConfig
) -> CriticReward:
    expected = policy.feature_dim + policy.executed_size
    if reward.num_inputs != expected:
        raise UserError(
            f"--method.reward_path={config.reward_path}: its critic sees {reward.num_inputs} "
            f"numbers, and this run's policy has {expected}, {policy.feature_dim} features and "
            f"{policy.executed_size} of a chunk; take a run on the same base and chunk length"
        )
    return reward

"""The network of a plain MLP flow, and its evaluations along a path by the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vla_trqam.errors import UserError
from vla_trqam.networks import LAYER_NORM_EPS, MLP
from vla_trqam.policy import PathFields


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
        n_action_steps: n, the actions of a chunk that are executed; None for all.
    """

    observation_dim: int
    action_dim: int
    chunk_length: int
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = False
    num_flow_steps: int = 10
    n_action_steps: int | None = None

    def __post_init__(self) -> None:
        sizes = {"observation_dim": self.observation_dim, "action_dim": self.action_dim}
        sizes |= {"chunk_length": self.chunk_length, "num_flow_steps": self.num_flow_steps}
        for name, size in (*sizes.items(), *(("hidden_dims", w) for w in self.hidden_dims)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(f"{name} has {size!r}; it must be a whole number of at least 1")
        if self.n_action_steps not in (None, *range(1, self.chunk_length + 1)):
            raise UserError(
                f"n_action_steps has {self.n_action_steps!r}; of chunks of {self.chunk_length} "
                f"actions 1 to {self.chunk_length} can be executed"
            )


class VelocityMLP(MLP):
    """The field's network over flattened chunks: ``concat(s, x, tau)`` (N, in) -> (N, H * A).

    It is too small to gain by bfloat16, in which the kernel's gradients would be coarse.
    """

    def __init__(self, config: MLPFlowConfig) -> None:
        out_dim = config.chunk_length * config.action_dim
        in_dim = config.observation_dim + out_dim + 1
        super().__init__(in_dim, out_dim, config.hidden_dims, layer_norm=config.layer_norm)


class MLPPathFields(PathFields):
    """:class:`vla_trqam.kernels.mlp_path.SharedPath` as the contract wants it.

    Args:
        tuned: the tuned field's network.
        base: the base's.
        features: of the path's observations, (B, O).
        next_features: of those whose next action is sampled beside the path, (B, O).
        num_flow_steps: K.
    """

    def __init__(
        self,
        tuned: VelocityMLP,
        base: VelocityMLP,
        features: Tensor,
        next_features: Tensor,
        num_flow_steps: int,
    ) -> None:
        from vla_trqam.kernels.mlp_path import Network, SharedPath

        def weights(network: VelocityMLP) -> Network:
            layers = [(layer.weight, layer.bias) for layer in network.layers]
            norms = [(norm.weight, norm.bias) for norm in network.norms]
            return Network(layers, norms, LAYER_NORM_EPS)

        self._shared = SharedPath(
            weights(tuned), weights(base), features, next_features, num_flow_steps
        )

    def evaluate(
        self,
        x: Tensor,
        next_x: Tensor | None,
        tau: float,
        adjoint_tau: float | None,
        *,
        trained: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :meth:`PathFields.evaluate`; all steps are one node, whose gradient is cheap."""
        # The products have a block for the next action, asked for or not.
        asked = x if next_x is None else next_x
        tuned, base, following = self._shared.evaluate(x, asked, tau, adjoint_tau)
        return tuned, base, None if next_x is None else following

    def tuned(self) -> Tensor:
        """See :meth:`PathFields.tuned`."""
        return self._shared.tuned()

    def base(self) -> Tensor:
        """See :meth:`PathFields.base`."""
        return self._shared.base()

    def base_pullback(self, step: int, cotangent: Tensor) -> Tensor:
        """See :meth:`PathFields.base_pullback`."""
        return self._shared.base_pullback(step, cotangent)

"""Chunked transitions: what every data source hands to the critic and the actor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar  # of Python 3.13, for the default

INTERVENTION = ("intervention", "is_intervention")
"""Last parts of the names of columns that tell where a person took over."""

Field = Tensor | list[str]
"""One entry of a dictionary observation: (B, ...), or B texts such as the tasks."""

# A sampler of images gives dict[str, Field]; TransitionBatch alone means TransitionBatch[Tensor].
Observation = TypeVar("Observation", bound=Tensor | dict[str, Field], default=Tensor)


@dataclass(frozen=True)
class TransitionBatch(Generic[Observation]):
    """A batch of chunks (s_t, a_t..a_{t+n-1}, R, s_{t+n}), whose n <= H steps were really taken.

    The TD target of a chunk is `chunk_return + discount * Q(next_observation, ·) * ~terminated`.
    `terminated` and `truncated` are never both true for a row.

    Attributes:
        observation: s_t in the environment's units (the policy normalises): (B, O), or a dictionary
            of (B, ...) tensors and lists of B texts, as LeRobot's collated items.
        action: executed actions, (B, H, A), in the policy's normalised space: those of the n steps,
            and what was done after them. Where `valid` is False the row repeats the last action of
            the episode.
        chunk_return: sum over i < n of γ^i r_{t+i}, (B,).
        next_observation: s_{t+n}, like `observation`. Where `terminated`, it may be any state.
        discount: γ^n, (B,).
        terminated: (B,) bool, the task ended at s_{t+n}: nothing to bootstrap from.
        truncated: (B,) bool, the episode was cut at s_{t+n}: bootstrap as if it had gone on.
        valid: (B, H) bool, False for the tail of a chunk that comes after the episode's end.
        columns: further columns of the replay, such as interventions: name -> (B, H, ...). Like
            `action`, the tail repeats the episode's last.
        next_action: what the policy would execute at s_{t+n} in its normalised space, (B, n, a),
            where that was drawn before; None where an update draws it.
    """

    observation: Observation
    action: Tensor
    chunk_return: Tensor
    next_observation: Observation
    discount: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    next_action: Tensor | None = None

    def __len__(self) -> int:
        return self.action.shape[0]

    @property
    def intervened(self) -> Tensor | None:
        """(B, H) bool, the actions that a person took, by any column; None where none tells."""
        told = [v for name, v in self.columns.items() if tells_interventions(name)]
        if not told:
            return None
        # A column may tell of several arms.
        taken = torch.stack([(c.reshape(*self.valid.shape, -1) != 0).any(dim=-1) for c in told])
        return taken.any(dim=0) & self.valid

    @property
    def chunk_length(self) -> int:
        """H, the number of actions in a chunk."""
        return self.action.shape[1]

    def to(
        self, device: torch.device | str, *, non_blocking: bool = False
    ) -> TransitionBatch[Observation]:
        """The same batch on `device`; copies nothing where it already lies there."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TransitionBatch[Observation]:
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def concatenate(
        first: TransitionBatch[Observation], second: TransitionBatch[Observation]
    ) -> TransitionBatch[Observation]:
        """The rows of `first`, then those of `second`; both must share every shape but B.

        Raises:
            ValueError: the observations have different keys.
        """
        return TransitionBatch(
            *(_joined(getattr(first, name), getattr(second, name)) for name in _FIELD_NAMES)
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> TransitionBatch[Observation]:
        return TransitionBatch(*(_mapped(getattr(self, name), function) for name in _FIELD_NAMES))


def tells_interventions(column: str) -> bool:
    """Whether a column of this name says where a person took over."""
    return column.rpartition(".")[2] in INTERVENTION


_FIELD_NAMES = tuple(item.name for item in fields(TransitionBatch))


def _mapped(
    value: Tensor | Mapping[str, Field] | None, function: Callable[[Tensor], Tensor]
) -> Any:
    """`function` of the tensor, or of every tensor in the dictionary; texts stay as they are."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(value)
    return {
        key: function(entry) if isinstance(entry, Tensor) else entry for key, entry in value.items()
    }


def _joined(
    first: Field | Mapping[str, Field] | None, second: Field | Mapping[str, Field] | None
) -> Any:
    """Rows of both: tensors, lists of texts, or dictionaries of those with the same keys."""
    if first is None or second is None:
        if first is not second:
            raise ValueError("next actions of one of two batches do not join")
        return None
    if isinstance(first, Tensor):
        return torch.cat((first, cast(Tensor, second)))
    if isinstance(first, list):
        return [*first, *cast(list[str], second)]
    other = cast(Mapping[str, Field], second)
    if first.keys() != other.keys():
        raise ValueError(f"observations of {sorted(first)} and of {sorted(other)} do not join")
    return {key: _joined(first[key], other[key]) for key in first}


def chunk_return(rewards: Tensor, discount: float, num_steps: Tensor) -> Tensor:
    """R = sum over i < n of γ^i r_{t+i}.

    Args:
        rewards: r_t..r_{t+H-1}, (..., H). Entries from n on are ignored.
        discount: γ, per step.
        num_steps: n, (...), integers between 0 and H.

    Returns:
        R, (...), in the dtype of `rewards`.
    """
    step = torch.arange(rewards.shape[-1], device=rewards.device)
    weight = torch.pow(discount, step.to(rewards.dtype))
    taken = step < num_steps.unsqueeze(-1)
    # where, not a product: an ignored entry must not matter even if it is not finite.
    return torch.where(taken, rewards * weight, torch.zeros_like(rewards)).sum(-1)

"""The plain evaluations along a path: how many there are, and what is kept of them."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from flow_problems import SCHEMES, FunctionPolicy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla_trqam.adjoint import lean_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.policy import PathFields
from vla_trqam.sde import Velocity, sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid

STEPS, BATCH, CHUNK = 4, 3, (2, 3)


class Network(nn.Module):
    """A field with a hidden layer to be kept or computed again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        size = CHUNK[0] * CHUNK[1]
        self.layers = nn.Sequential(nn.Linear(size + 1, width), nn.Tanh(), nn.Linear(width, size))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), tau[:, None]], dim=1)).view_as(x)


class Counted(FunctionPolicy):
    """Counts the evaluations of both fields, and those of the base that could be differentiated."""

    def __init__(self, tuned: Velocity, base: Velocity) -> None:
        super().__init__(tuned, base, CHUNK, STEPS)
        self.calls: Counter[str] = Counter()

    def velocity(self, x: Tensor, tau: Tensor, context: Any) -> Tensor:
        self.calls["tuned"] += 1
        return super().velocity(x, tau, context)

    def base_velocity(self, x: Tensor, tau: Tensor, context: Any) -> Tensor:
        self.calls["base"] += 1
        value = super().base_velocity(x, tau, context)
        self.calls["base with a graph"] += value.requires_grad
        return value


def policy_of(width: int = 16) -> Counted:
    torch.manual_seed(0)
    return Counted(Network(width), Network(width).requires_grad_(False))


def update(
    policy: Counted,
    scheme: Scheme,
    *,
    jacobians: bool = True,
    batch: int = BATCH,
    keep_activations: bool = True,
) -> tuple[Tensor, PathFields]:
    """The adjoint loss of one update, and its fields."""
    grid = TimeGrid(STEPS, scheme)
    fields = policy.path_fields(None, None, keep_activations=keep_activations)
    noise = torch.randn(STEPS + 2, batch, *CHUNK, generator=torch.Generator().manual_seed(1))
    path, _ = sample_path_and_next_action(
        fields, noise[0], noise[2:], noise[1], grid, jacobians=jacobians
    )
    adjoint = path.states
    if jacobians:
        adjoint = lean_adjoint(torch.cos(path.x_1), fields.base_pullback, grid)
    gap = fields.tuned() - fields.base()
    return adjoint_matching_loss(gap, adjoint, grid, 0.7), fields


def gradients(policy: Counted, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.trainable_parameters())))


@pytest.mark.parametrize(
    ("scheme", "bases"),
    [
        (Posterior(), STEPS),
        (ShiftedEuler(adjoint_time="same"), STEPS),
        (ShiftedEuler(), 2 * STEPS),
    ],
)
def test_where_the_adjoint_asks_at_the_paths_own_times_the_base_is_asked_once_a_step(
    scheme: Scheme, bases: int
) -> None:
    policy = policy_of()
    loss, _ = update(policy, scheme)
    gradients(policy, loss)
    assert (policy.calls["base"], policy.calls["tuned"]) == (bases, 2 * STEPS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_jacobians_the_base_is_asked_once_a_step_and_never_with_a_graph(
    scheme: Scheme,
) -> None:
    policy = policy_of()
    gradients(policy, update(policy, scheme, jacobians=False)[0])
    assert policy.calls["base"] == STEPS
    assert policy.calls["base with a graph"] == 0


def test_the_first_step_needs_no_graph_where_nothing_asks_for_its_jacobian() -> None:
    policy = policy_of()
    update(policy, Posterior())
    assert policy.calls["base with a graph"] == STEPS - 1


def test_a_jacobian_that_nobody_announced_is_not_given() -> None:
    _, fields = update(policy_of(), Posterior())
    with pytest.raises(AssertionError, match="nobody said"):
        fields.base_pullback(0, torch.ones(BATCH, *CHUNK))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_kept_activations_the_numbers_are_the_same_to_the_bit(scheme: Scheme) -> None:
    policy = policy_of()
    kept, fields = update(policy, scheme)
    again, others = update(policy, scheme, keep_activations=False)
    assert torch.equal(fields.tuned(), others.tuned())
    assert torch.equal(fields.base(), others.base())
    assert torch.equal(kept, again)
    for mine, other in zip(gradients(policy, kept), gradients(policy, again), strict=True):
        assert torch.equal(mine, other)


def test_what_is_not_kept_is_computed_again() -> None:
    policy = policy_of()
    gradients(policy, update(policy, Posterior(), keep_activations=False)[0])
    # The K - 1 pullbacks and the K terms of the gradient once more each.
    assert policy.calls["base"] == 2 * STEPS - 1
    assert policy.calls["tuned"] == 3 * STEPS


class LiveBytes(TorchDispatchMode):
    """How much memory operations' results hold at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(*, keep_activations: bool) -> int:
    policy = policy_of(width=512)
    with LiveBytes() as memory:
        loss, _ = update(policy, Posterior(), batch=256, keep_activations=keep_activations)
        gradients(policy, loss)
    return memory.peak


def test_without_kept_activations_an_update_holds_those_of_one_step_at_a_time() -> None:
    """A hidden layer's 512 kB: before the update's end K of the tuned field's are kept or none."""
    hidden = 256 * 512 * 4
    kept, again = peak_bytes(keep_activations=True), peak_bytes(keep_activations=False)
    assert kept > STEPS * hidden
    assert again < kept - (STEPS - 1) * hidden

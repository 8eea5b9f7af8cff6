"""How often an update asks the fields: the table of docs/method.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flow_problems import FunctionPolicy
from torch import Tensor

from vla_trqam.adjoint import lean_adjoint, scalar_adjoint
from vla_trqam.losses import adjoint_matching_loss
from vla_trqam.sde import Velocity, sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid

STEPS = 5
TABLE = """
| posterior, lean | 3K | K - 1 | K |
| posterior or shifted Euler, scalar | 3K | 0 | K |
| shifted Euler, lean | 4K | K | K |
| the same, `adjoint_time: same` | 3K | K | K |
"""


class Counted(torch.autograd.Function):
    """The field ``-weight x``, which counts how it is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        counts["forward"] += 1
        return -weight * x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.counts["pullback"] += to_x
        ctx.counts["backward"] += to_weight
        (cotangent,) = cotangents
        to_inputs = -weight * cotangent if to_x else None
        return to_inputs, -(x * cotangent).sum() if to_weight else None, None


def counted(weight: Tensor, counts: dict[str, int]) -> Velocity:
    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return Counted.apply(x, weight, counts)

    return velocity


def counts_of(scheme: Scheme, *, lean: bool, keep_activations: bool = True) -> tuple[int, int, int]:
    counts = {"forward": 0, "pullback": 0, "backward": 0}
    weight, grid = torch.ones((), requires_grad=True), TimeGrid(STEPS, scheme)
    tuned, base = counted(weight, counts), counted(torch.ones(()), counts)
    policy = FunctionPolicy(tuned, base, (1, 2), STEPS)
    fields = policy.path_fields(None, None, keep_activations=keep_activations)
    noise = torch.randn(STEPS + 2, 4, 1, 2)
    path, _ = sample_path_and_next_action(
        fields, noise[0], noise[2:], noise[1], grid, jacobians=lean
    )
    end = -torch.ones_like(path.x_1)
    adjoint = lean_adjoint(end, fields.base_pullback, grid) if lean else scalar_adjoint(end, grid)
    adjoint_matching_loss(fields.tuned() - fields.base(), adjoint, grid, 1.0).backward()
    return counts["forward"], counts["pullback"], counts["backward"]


def test_the_page_has_this_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "method.md"
    assert TABLE in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("scheme", "lean", "expected"),
    [
        (Posterior(), True, (3 * STEPS, STEPS - 1, STEPS)),
        (Posterior(), False, (3 * STEPS, 0, STEPS)),
        (ShiftedEuler(), False, (3 * STEPS, 0, STEPS)),
        (ShiftedEuler(), True, (4 * STEPS, STEPS, STEPS)),
        (ShiftedEuler(adjoint_time="same"), True, (3 * STEPS, STEPS, STEPS)),
    ],
    ids=str,
)
def test_an_update_asks_the_fields_as_often_as_the_table_says(
    scheme: Scheme, lean: bool, expected: tuple[int, int, int]
) -> None:
    assert counts_of(scheme, lean=lean) == expected


@pytest.mark.parametrize(("lean", "of_the_base"), [(True, STEPS - 1), (False, 0)])
def test_without_kept_activations_the_same_is_asked_again(lean: bool, of_the_base: int) -> None:
    kept = counts_of(Posterior(), lean=lean)
    again = counts_of(Posterior(), lean=lean, keep_activations=False)
    assert again == (kept[0] + STEPS + of_the_base, kept[1], kept[2])

"""The evaluations along a path that the kernel shares, against one at a time by autograd."""

import pytest
import torch
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.adapters.velocity_mlp import MLPPathFields

from vla_trqam.kernel_choice import Kernels, chosen_kernels
from vla_trqam.policy import PathFields
from vla_trqam.sde import sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid

OBSERVATION = 5
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}
SHAPES = [
    ((2, 3), (24, 32), True, 4, 7),
    ((1, 2), (16,), False, 3, 1),
    ((5, 7), (33, 17, 8), True, 6, 12),
    ((2, 2), (16, 16), False, 10, 33),
    ((2, 1), (), False, 3, 5),
]
SCHEMES = [Posterior(), ShiftedEuler(), ShiftedEuler(adjoint_time="same")]


def policy_of(
    chunk: tuple[int, int], hidden: tuple[int, ...], norm: bool, steps: int, dtype: torch.dtype
) -> MLPFlowPolicy:
    """Random weights everywhere; the tuned field is not the base."""
    torch.manual_seed(steps)
    config = MLPFlowConfig(OBSERVATION, chunk[1], chunk[0], hidden, norm, steps)
    policy = MLPFlowPolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.to(dtype)


def path_of(
    kernels: Kernels, policy: MLPFlowPolicy, scheme: Scheme, rows: int
) -> tuple[PathFields, list[Tensor]]:
    """The fields of a path, its states and the next action."""
    generator, dtype = torch.Generator().manual_seed(rows), policy.observation_mean.dtype
    steps = policy.num_flow_steps
    seen, following = torch.randn(2, rows, OBSERVATION, generator=generator).to(dtype)
    noise = torch.randn(steps + 2, rows, *policy.chunk_shape, generator=generator).to(dtype)
    with chosen_kernels(kernels):
        fields = policy.path_fields(policy.encode(seen), policy.encode(following))
        grid = TimeGrid(steps, scheme)
        path, action = sample_path_and_next_action(fields, noise[0], noise[2:], noise[1], grid)
    return fields, [path.x, action]


def derivatives(
    fields: PathFields, policy: MLPFlowPolicy, scheme: Scheme, like: Tensor
) -> list[Tensor]:
    """Pullbacks of the base at every step that has one, and the gradients to the weights."""
    generator = torch.Generator().manual_seed(1)
    asked = [s.adjoint_tau is not None for s in TimeGrid(policy.num_flow_steps, scheme).steps]
    pulled = [
        fields.base_pullback(i, torch.randn(like.shape, generator=generator).to(like))
        for i, wanted in enumerate(asked)
        if wanted
    ]
    tuned = fields.tuned()
    weight = torch.randn(tuned.shape, generator=generator).to(tuned)
    return [*pulled, *torch.autograd.grad(tuned, list(policy.trainable_parameters()), weight)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("chunk", "hidden", "norm", "steps", "rows"), SHAPES)
def test_values_pullbacks_and_gradients_are_the_plain_ones(
    chunk: tuple[int, int],
    hidden: tuple[int, ...],
    norm: bool,
    steps: int,
    rows: int,
    scheme: Scheme,
    dtype: torch.dtype,
) -> None:
    policy = policy_of(chunk, hidden, norm, steps, dtype)
    fields, ours = path_of("fast", policy, scheme, rows)
    plain_fields, plain = path_of("plain", policy, scheme, rows)
    assert isinstance(fields, MLPPathFields)
    assert type(plain_fields) is PathFields
    for found, its in ((ours, fields), (plain, plain_fields)):
        found += [its.tuned().detach(), its.base()]
        found += derivatives(its, policy, scheme, found[1])
    for mine, other in zip(ours, plain, strict=True):
        assert mine.dtype == dtype
        size = float(other.abs().max())
        torch.testing.assert_close(
            mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + size)
        )


def test_the_bases_weights_take_no_gradient_either_way() -> None:
    policy = policy_of((2, 3), (16,), True, 4, torch.float32)
    for kernels in ("fast", "plain"):
        fields, _ = path_of(kernels, policy, Posterior(), 3)
        fields.tuned().sum().backward()
        assert all(p.grad is None for p in policy.base.parameters())
        assert all(p.grad is not None for p in policy.tuned.parameters())
        policy.zero_grad()


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_autocast_lowers_neither_the_values_nor_the_pullback(kernels: Kernels) -> None:
    policy = policy_of((2, 3), (16, 16), True, 4, torch.float32)
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            fields, values = path_of(kernels, policy, Posterior(), 3)
            cotangent = torch.ones_like(values[1])
            found.append([*values, *(fields.base_pullback(i, cotangent) for i in range(1, 4))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

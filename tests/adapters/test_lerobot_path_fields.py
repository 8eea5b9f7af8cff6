"""A LeRobot policy's fields along a path: what the shared contract does not ask."""

import pytest
import torch
from contract import BATCH
from lerobot_contract import (
    FAMILIES,
    checkpoint,
    counted_evaluations,
    make_policy,
    observation,
    raw_observation,
)
from torch import Tensor
from vla_trqam.adapters.lerobot_policy import Encoding, LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings

from vla_trqam.policy import PathFields

pytestmark = pytest.mark.slow

HALF = "smolvla_bfloat16"
KINDS = (*FAMILIES, HALF)


def moved(kind: str, *, lora: bool = True) -> LeRobotFlowPolicy:
    policy = make_policy(kind, lora=lora)
    _move(policy)
    return policy


def _move(policy: LeRobotFlowPolicy) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            step = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.1 * step)


def points(policy: LeRobotFlowPolicy, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, BATCH, *policy.chunk_shape, generator=generator)


def evaluated(fields: PathFields, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fields.evaluate(states[0], states[1], 0.3, 0.4)


def with_task(policy: LeRobotFlowPolicy, task: str, seed: int) -> Encoding:
    return policy.encode(raw_observation(BATCH, seed) | {"task": [task] * BATCH})


def test_the_next_observations_instructions_may_be_longer_or_shorter() -> None:
    """SmolVLA's preprocessor pads instructions to the longest of their batch only."""
    policy = moved("smolvla")
    states = points(policy, 2)
    contexts = [with_task(policy, "go", 0), with_task(policy, "lift the red cube", 1)]
    lengths = [c.condition.pad_masks.shape[1] for c in contexts]
    assert lengths[0] < lengths[1]
    for first, second in (contexts, contexts[::-1]):
        found = evaluated(policy.path_fields(first, second), states)
        expected = evaluated(PathFields(policy, first, second), states)
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05"])
def test_the_hosts_attention_is_its_own_again_afterwards(kind: str) -> None:
    policy = moved(kind)
    config = policy.host.model.paligemma_with_expert.gemma_expert.model.config
    context, states = policy.encode(observation(kind)), points(policy, 2)
    tau = torch.full((BATCH,), 0.3)
    before = policy.velocity(states[0], tau, context)
    fields = policy.path_fields(context, context)
    evaluated(fields, states)
    assert config._attn_implementation == "eager"
    wrong = states[0][..., :-1]
    with pytest.raises(RuntimeError):
        fields.evaluate(wrong, wrong, 0.3, 0.4)
    assert config._attn_implementation == "eager"
    assert torch.equal(policy.velocity(states[0], tau, context), before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_path_has_evaluated_is_not_asked_again(kind: str) -> None:
    policy = moved(kind)
    context, states = policy.encode(observation(kind)), points(policy, 4)
    with counted_evaluations(policy) as counts:
        fields = policy.path_fields(context, context)
        for i in range(4):
            fields.evaluate(states[i], states[i], i / 4, i / 4)
        assert dict(counts) == {"tuned": 8, "base": 4}
        assert fields.tuned().shape == fields.base().shape == states.shape
        fields.base_pullback(2, states[0])
        fields.tuned().sum().backward()
    assert dict(counts) == {"tuned": 8, "base": 4}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_evaluations_of_a_path_share_is_computed_once_a_field(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = moved(kind)
    context, states = policy.encode(observation(kind)), points(policy, 4)
    share, asked = policy.family.share, []
    monkeypatch.setattr(policy.family, "share", lambda *args: asked.append(1) or share(*args))
    fields = policy.path_fields(context, context)
    for i in range(4):
        fields.evaluate(states[i], states[i], i / 4, (i + 1) / 4)
    fields.base_pullback(3, states[0])
    assert len(asked) == 3  # of the tuned field, of the next action's, and of the base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_equal_fields_are_equal_to_the_bit_along_a_path(kind: str, lora: bool, ahead: int) -> None:
    """Whether the base's evaluation has a graph, as where its Jacobian is wanted too, or not."""
    policy = make_policy(kind, lora=lora)
    context, states = policy.encode(observation(kind)), points(policy, 4)
    fields = policy.path_fields(context, context)
    for i in range(4):
        fields.evaluate(states[i], states[i], i / 4, (i + ahead) / 4)
    assert torch.equal(fields.tuned(), fields.base())
    assert fields.tuned().requires_grad
    assert not fields.base().requires_grad


def in_dtype(kind: str, dtype: str) -> LeRobotFlowPolicy:
    torch.manual_seed(5)  # of the fresh adapters
    own = [] if kind == HALF else [f"--dtype={dtype}"]
    policy = load_policy(checkpoint(kind), lora=LoRASettings(r=4), overrides=own)
    if kind == HALF and dtype == "float32":
        policy.host.float()
    _move(policy)
    return policy


@pytest.mark.parametrize("kind", ["tiny_pi0", HALF])
@pytest.mark.parametrize("adjoint_tau", [0.3, 0.4])
def test_the_pullback_in_bfloat16_is_the_float32_models(adjoint_tau: float, kind: str) -> None:
    """The state and the adjoint stay float32; the network's rounding is all that differs."""
    pulled, values = [], []
    for dtype in ("float32", "bfloat16"):
        policy = in_dtype(kind, dtype)
        context, states = policy.encode(observation(kind)), points(policy, 3)
        fields = policy.path_fields(context, context)
        found = fields.evaluate(states[0], states[1], 0.3, adjoint_tau)
        gradient = fields.base_pullback(0, states[2])
        assert {t.dtype for t in (*found, gradient, fields.tuned())} == {torch.float32}
        pulled.append(gradient)
        values.append(torch.stack(found))
    for single, half in (pulled, values):
        assert 0.0 < float((half - single).norm() / single.norm()) < 0.03


@pytest.mark.parametrize("trained", ["adapters", "expert", "expert in float32"])
@pytest.mark.parametrize("adjoint_tau", [0.3, 0.4])
def test_in_bfloat16_a_path_is_the_hosts_own_evaluations(adjoint_tau: float, trained: str) -> None:
    """SmolVLA's expert, through which we walk layer by layer."""
    lora = LoRASettings(r=4) if trained == "adapters" else None
    policy = load_policy(checkpoint(HALF), lora=lora, in_float32=trained == "expert in float32")
    _move(policy)
    context, states = policy.encode(observation(HALF)), points(policy, 3)
    both = policy.path_fields(context, context), PathFields(policy, context, context)
    found = [f.evaluate(states[0], states[1], 0.3, adjoint_tau) for f in both]
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    pulled, expected = (f.base_pullback(0, states[2]) for f in both)
    assert float((pulled - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint_tau", [0.3, 0.4])
def test_under_autocast_the_fields_are_the_plain_ones_and_equal_at_the_start(
    kind: str, adjoint_tau: float
) -> None:
    """As in a run with mixed precision."""
    for policy, moves in ((make_policy(kind, lora=True), False), (moved(kind), True)):
        with torch.autocast("cpu", torch.bfloat16):
            context, states = policy.encode(observation(kind)), points(policy, 3)
            fields, plain = (
                policy.path_fields(context, context),
                PathFields(policy, context, context),
            )
            evaluations = (
                f.evaluate(states[0], states[1], 0.3, adjoint_tau) for f in (fields, plain)
            )
            for ours, theirs in zip(*evaluations, strict=True):
                assert float((ours - theirs).norm() / theirs.norm()) < 0.03
            pulled, expected = (f.base_pullback(0, states[2]) for f in (fields, plain))
            tuned, base = fields.tuned(), fields.base()
        assert float((pulled - expected).norm() / expected.norm()) < 0.03
        assert torch.equal(tuned, base) != moves
        tuned.sum().backward()
        assert all(p.grad is not None for p in policy.trainable_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_what_is_not_kept_is_computed_again_with_the_same_gradient(
    kind: str,
) -> None:
    policy, gradients = moved(kind), []
    parameters = list(policy.trainable_parameters())
    for keep in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            context, states = policy.encode(observation(kind)), points(policy, 3)
            fields = policy.path_fields(context, context, keep_activations=keep)
            for i in range(2):
                fields.evaluate(states[i], states[2], i / 2, i / 2)
            loss = fields.tuned().square().sum()
        gradients.append(torch.autograd.grad(loss, parameters))
    for kept, again in zip(*gradients, strict=True):
        assert float(kept.abs().max()) > 0
        assert float((kept - again).norm() / kept.norm()) < 0.01

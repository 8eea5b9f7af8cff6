"""What LoRA, the frozen copy and the shared prefix promise beyond the contract."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import BATCH
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot_contract import (
    ACTION,
    FAMILIES,
    STATE,
    LeRobotContract,
    checkpoint,
    host_loss,
    make_policy,
    observation,
    raw_observation,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor
from vla_trqam.adapters.families.registry import family_of
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import fetch as fetch_checkpoint
from vla_trqam.adapters.loading import load_host, load_policy, read_config
from vla_trqam.adapters.lora import LoRASettings, with_lora
from vla_trqam.adapters.tiny import checkpoints as tiny

from vla_trqam.errors import UserError
from vla_trqam.policy import FlowPolicy
from vla_trqam.preflight.live_bytes import LiveBytes
from vla_trqam.preflight.memory import tensor_bytes

pytestmark = pytest.mark.slow

VLAS = ("tiny_pi0", "tiny_pi05", "smolvla")


def size(tensors: Any) -> tuple[int, int]:
    """Numbers and bytes in storages; what is tied counts once."""
    storages = {t.untyped_storage().data_ptr(): t for t in tensors}
    numbers = sum(t.numel() for t in storages.values())
    return numbers, sum(t.numel() * t.element_size() for t in storages.values())


def everything(policy: LeRobotFlowPolicy) -> list[Tensor]:
    """Every tensor that any attribute of the policy holds, registered or not."""
    modules = [policy, *(policy.base._host)]
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def host_size(kind: str) -> tuple[int, int]:
    found = fetch_checkpoint(checkpoint(kind))
    host = load_host(found, read_config(found))
    return size([*host.parameters(), *host.buffers()])


def point(policy: LeRobotFlowPolicy, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, BATCH, *policy.chunk_shape, generator=generator)


# No second copy.


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_lora_no_weight_exists_twice(kind: str) -> None:
    policy = make_policy(kind, lora=True)
    numbers, bytes_ = size(everything(policy))
    adapters = size(policy.trainable_parameters())
    masks = size([policy._action_mask, policy._limits])
    stock = host_size(kind)
    assert numbers == stock[0] + adapters[0] + masks[0]
    assert bytes_ == stock[1] + adapters[1] + masks[1]
    assert adapters[0] < 0.05 * stock[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_full_only_the_expert_exists_twice(kind: str) -> None:
    policy = make_policy(kind, lora=False)
    expert = size(policy.trainable_parameters())
    copied = size(policy.base.parameters())
    assert copied == expert
    buffers = size(policy.base.buffers())
    masks = size([policy._action_mask, policy._limits])
    stock = host_size(kind)
    assert size(everything(policy))[0] == stock[0] + copied[0] + buffers[0] + masks[0]
    assert not any(p.requires_grad for p in policy.base.parameters())


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_full_size_models_are_seen_alike(kind: str) -> None:
    """4 billion parameters without memory for one of them: only names and shapes."""
    for lora in (True, False):
        features = tiny.flow_features(STATE, ACTION, ("top",), 224)
        make = {"pi0": PI0Config, "pi05": PI05Config}[kind]
        config = make(device="cpu", dtype="bfloat16", **features)
        config.device = "meta"
        with torch.device("meta"):
            model = get_policy_class(kind)(config)
        family = family_of(config)
        stock = sum(p.numel() for p in model.parameters())
        if lora:
            model = with_lora(model, family, LoRASettings(r=16), Path("somewhere"))
        policy = LeRobotFlowPolicy(model, family)
        trained = sum(p.numel() for p in policy.trainable_parameters())
        total = sum(p.numel() for p in policy.parameters())
        assert stock > 4.0e9
        assert total == stock + trained
        assert (trained < 1.5e6) if lora else (3.0e8 < trained < 4.5e8)
        assert policy.feature_dim == 2048 + STATE
        assert policy.chunk_shape == (50, 32)
        assert policy.num_flow_steps == 10


# LoRA.


@pytest.mark.parametrize("kind", VLAS)
def test_the_default_targets_are_lerobots_but_for_the_prefix(kind: str) -> None:
    policy = make_policy(kind, lora=True)
    adapted = {n for n, m in policy.host.named_modules() if isinstance(m, LoraLayer)}
    stock = load_host(*_config(kind))
    stock.config.pretrained_path = checkpoint(kind)
    stock.wrap_with_peft(peft_cli_overrides={"r": 4})
    theirs = {n for n, m in stock.named_modules() if isinstance(m, LoraLayer)}
    prefix = {"model.state_proj"} if kind == "smolvla" else set()
    assert adapted == theirs - prefix
    assert prefix <= theirs


def _config(kind: str) -> tuple[Any, Any]:
    found = fetch_checkpoint(checkpoint(kind))
    return found, read_config(found)


def test_an_adapter_in_the_prefix_is_refused() -> None:
    for target in (r".*language_model.*q_proj", r".*gemma_expert.*lm_head"):
        with pytest.raises(UserError, match="not in the action expert"):
            load_policy(checkpoint("tiny_pi0"), lora=LoRASettings(r=4, target_modules=target))
    with pytest.raises(UserError, match=r"would train model.state_proj"):
        load_policy(
            checkpoint("smolvla"),
            lora=LoRASettings(r=4, target_modules=("state_proj", "action_in_proj")),
        )


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="target_modules"):
        load_policy(checkpoint("tiny_pi0"), lora=LoRASettings(target_modules=("nothing",)))
    with pytest.raises(UserError, match=r"peft.r is 0"):
        LoRASettings(r=0)


def test_modules_can_be_trained_in_full_beside_adapters(tmp_path: Any) -> None:
    settings = LoRASettings(r=4, full_training_modules=("action_out_proj",))
    policy = load_policy(checkpoint("tiny_pi0"), lora=settings)
    x, tau = point(policy)[0], torch.full((BATCH,), 0.4)
    context = policy.encode(observation("tiny_pi0"))
    before = policy.base_velocity(x, tau, context)
    assert torch.equal(policy.velocity(x, tau, context), before)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    assert torch.equal(policy.base_velocity(x, tau, context), before)
    tuned = policy.velocity(x, tau, context)
    assert not torch.equal(tuned, before)
    policy.save_pretrained(tmp_path, merged=True)
    loaded = load_policy(tmp_path, lora=None)
    again = loaded.velocity(x, tau, loaded.encode(observation("tiny_pi0")))
    torch.testing.assert_close(again, tuned, rtol=1e-4, atol=1e-5)


def test_adapters_are_on_again_after_an_error_in_the_base() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    x, context = point(policy)[0], policy.encode(observation("tiny_pi0"))
    trained = sum(p.numel() for p in policy.trainable_parameters())
    with pytest.raises(ValueError, match="time tensor"):
        policy.base_velocity(x, torch.zeros(BATCH, 1), context)
    assert sum(p.numel() for p in policy.trainable_parameters()) == trained


# The shared prefix.


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_training_leaves_the_prefix_as_it_is(kind: str, lora: bool) -> None:
    policy = make_policy(kind, lora=lora)
    before = policy.encode(observation(kind))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    after = policy.encode(observation(kind))
    assert torch.equal(before.features, after.features)
    assert all(
        torch.equal(a, b)
        for a, b in zip(_cached(before.condition), _cached(after.condition), strict=True)
    )
    assert not any(t.requires_grad for t in _cached(after.condition))


def _cached(condition: Any) -> list[Tensor]:
    if isinstance(condition, Tensor):
        return [condition]
    return [t for layer in condition.cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_encoding_serves_many_evaluations_with_gradients(kind: str) -> None:
    """SmolVLA's cache would keep the graph of the first one."""
    policy = make_policy(kind, lora=True)
    context = policy.encode(observation(kind))
    shapes = [t.shape for t in _cached(context.condition)]
    x = point(policy)[0].requires_grad_(True)
    for tau in (0.1, 0.6):
        for field in (policy.velocity, policy.base_velocity):
            field(x, torch.full((BATCH,), tau), context).square().sum().backward()
    assert [t.shape for t in _cached(context.condition)] == shapes
    assert not any(t.requires_grad for t in _cached(context.condition))


def test_raw_observations_are_preprocessed() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    raw = policy.encode(raw_observation(BATCH, 0))
    assert torch.equal(raw.features, policy.encode(observation("tiny_pi0")).features)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoding_can_be_kept_as_tensors_row_by_row(kind: str) -> None:
    policy = make_policy(kind, lora=True)
    seen, x = observation(kind), point(policy)[0]
    packed = policy.packed(seen)
    assert all(len(value) == BATCH for value in packed.values())
    order = torch.tensor([2, 0, 1])
    rows = policy.encode({key: value[order] for key, value in packed.items()})
    whole, tau = policy.encode(seen), torch.full((BATCH,), 0.4)
    assert torch.equal(policy.features(rows), policy.features(whole)[order])
    for field in (policy.velocity, policy.base_velocity):
        expected = field(x[order.argsort()], tau, whole)[order]
        torch.testing.assert_close(field(x, tau, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_memory_of_a_prefixs_pass_does_not_grow_with_the_batch(kind: str) -> None:
    """Counted tensor by tensor, beyond what the pass returns; and the numbers are the same."""
    policy = make_policy(kind, lora=True)
    assert policy.processors is not None
    policy.processors.pad_instructions()
    policy.encoded_at_once, few, many = 2, 4, 8
    beyond = []
    for rows in (few, many):
        raw = raw_observation(rows, 0)
        with LiveBytes() as live:
            packed = policy.packed(raw)
        beyond.append(live.peak - tensor_bytes(packed.values()))
    assert beyond[1] == pytest.approx(beyond[0], rel=0.05)
    policy.encoded_at_once = many
    with LiveBytes() as live:
        whole = policy.packed(raw)
    assert live.peak - tensor_bytes(whole.values()) > 1.5 * beyond[0]
    for key, value in whole.items():
        torch.testing.assert_close(packed[key], value, rtol=1e-4, atol=1e-5)


def test_pictures_of_bytes_are_those_of_numbers_between_0_and_1() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    raw = raw_observation(BATCH, 0)
    cameras = [key for key in raw if key.startswith("observation.images")]
    bytes_ = {key: (raw[key] * 255).to(torch.uint8) for key in cameras}
    expected = policy.packed(raw | {key: value.float() / 255 for key, value in bytes_.items()})
    for key, value in policy.packed(raw | bytes_).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_time_axis_of_one_is_accepted_for_the_state(kind: str) -> None:
    """LeRobot's datasets give one to some policies."""
    policy, seen = make_policy(kind, lora=True), observation(kind)
    if kind in ("tiny_pi0", "tiny_pi05"):
        return
    expected = policy.encode(seen).features
    seen["observation.state"] = seen["observation.state"].unsqueeze(1)
    assert torch.equal(policy.encode(seen).features, expected)


# Behaviour cloning at an episode's end.


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [(kind, []) for kind in FAMILIES] + [("multi_task_dit", ["--do_mask_loss_for_padding=true"])],
)
def test_steps_behind_the_end_count_as_in_the_hosts_loss(kind: str, overrides: list[str]) -> None:
    policy = load_policy(checkpoint(kind), lora=LoRASettings(r=4), overrides=overrides)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(BATCH, *policy.chunk_shape, generator=generator)
    action = torch.randn(BATCH, policy.chunk_shape[0], ACTION, generator=generator)
    tau = torch.linspace(0.1, 0.9, BATCH)
    valid = torch.ones(BATCH, policy.chunk_shape[0], dtype=torch.bool)
    valid[0, 2:] = False
    valid[1] = False
    seen = observation(kind)
    loss = policy.behaviour_loss(policy.encode(seen), action, noise, tau, valid)
    theirs = host_loss(policy.host, seen, action, noise, tau, valid)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    whole = policy.behaviour_loss(policy.encode(seen), action, noise, tau)
    masked = kind == "smolvla" or bool(overrides)
    assert torch.equal(whole, loss) != masked


def test_padded_actions_are_taken_as_well() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    noise, action = point(policy, 2)
    tau, context = torch.full((BATCH,), 0.3), policy.encode(observation("tiny_pi0"))
    real = action[..., :ACTION]
    padded = policy.pad_action(real)
    assert padded.shape == noise.shape
    assert float(padded[..., ACTION:].abs().sum()) == 0.0
    losses = [policy.behaviour_loss(context, a, noise, tau) for a in (real, padded)]
    assert torch.equal(*losses)


# What the robot executes.


def test_limits_are_the_range_of_the_statistics_or_what_is_given() -> None:
    """The statistics are mean -0.3, std 1.7, range -1.3 to 1."""
    policy = make_policy("tiny_pi0", lora=True)
    low, high = policy.action_limits
    torch.testing.assert_close(low, torch.full((ACTION,), -1.0 / 1.7))
    torch.testing.assert_close(high, torch.full((ACTION,), 1.3 / 1.7))
    given = load_policy(checkpoint("tiny_pi0"), lora=LoRASettings(r=4), limits=(-1.0, [1, 2, 3]))
    assert policy.processors is not None
    robot = policy.processors.to_robot(torch.stack(given.action_limits))
    torch.testing.assert_close(robot, torch.tensor([[-1.0, -1, -1], [1, 2, 3]]))
    with pytest.raises(UserError, match="use_relative_actions"):
        load_policy(
            checkpoint("tiny_pi0"), limits=(-1.0, 1.0), overrides=["--use_relative_actions=true"]
        )
    for limits in ((1.0, -1.0), (-1.0, [1.0, 2.0])):
        with pytest.raises(UserError, match="limits"):
            load_policy(checkpoint("tiny_pi0"), limits=limits)


# Precision.


class InBfloat16(LeRobotContract):
    """The transformer computes in bfloat16; everything around it stays float32."""

    lora = True
    rtol, atol = 5e-2, 5e-2

    def test_the_base_pullback_is_the_finite_difference(self, moved: FlowPolicy) -> None:
        """bfloat16 has three digits, too few for differences: here, it is the float32 model's."""
        pulled = []
        for policy in (moved, self.in_float32()):
            x, cotangent = point(policy, 2)  # type: ignore[arg-type]
            context = policy.encode(observation(self.kind))
            x.requires_grad_(True)
            base = policy.base_velocity(x, torch.full((BATCH,), 0.6), context)
            pulled.append(torch.autograd.grad(base, x, cotangent)[0])
        assert float((pulled[0] - pulled[1]).norm() / pulled[1].norm()) < 0.03

    def in_float32(self) -> LeRobotFlowPolicy:
        return make_policy(self.kind, lora=True)

    def expert_dtype(self, host: Any) -> torch.dtype:
        raise NotImplementedError

    def test_the_arithmetic_around_the_network_is_float32(self) -> None:
        policy = self.make_policy()
        assert self.expert_dtype(policy.host) == torch.bfloat16
        context = policy.encode(observation(self.kind))
        x = point(policy)[0].requires_grad_(True)
        velocity = policy.velocity(x, torch.full((BATCH,), 0.3), context)
        (gradient,) = torch.autograd.grad(velocity.sum(), x)
        assert {velocity.dtype, gradient.dtype, context.features.dtype} == {torch.float32}
        assert all(p.dtype == torch.float32 for p in policy.trainable_parameters())
        assert context.features.shape[1] == 64 + STATE


class TestPI0InBfloat16(InBfloat16):
    """By its config."""

    kind = "tiny_pi0"

    def make_policy(self) -> LeRobotFlowPolicy:
        overrides = ["--dtype=bfloat16"]
        return load_policy(checkpoint(self.kind), lora=LoRASettings(r=4), overrides=overrides)

    def load(self, directory: Any) -> LeRobotFlowPolicy:
        return load_policy(directory, lora=LoRASettings(r=4))

    def expert_dtype(self, host: Any) -> torch.dtype:
        return host.model.paligemma_with_expert.gemma_expert.dtype


class TestSmolVLAInBfloat16(InBfloat16):
    """As LeRobot loads it over published weights: ``load_vlm_weights``."""

    kind = "smolvla_bfloat16"

    def in_float32(self) -> LeRobotFlowPolicy:
        policy = self.make_policy()
        policy.host.float()
        return policy

    def expert_dtype(self, host: Any) -> torch.dtype:
        return host.model.vlm_with_expert.lm_expert.layers[0].mlp.up_proj.weight.dtype

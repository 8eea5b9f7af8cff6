import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from contract import BATCH, FlowPolicyContract
from safetensors.torch import load_file, save_file
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import by_kernels, chosen_kernels
from vla_trqam.kernels import mlp_path
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise
from vla_trqam.policy import FlowPolicy

OBSERVATION = 6


def plain_velocity(policy: FlowPolicy, observation: Tensor, x: Tensor, tau: Tensor) -> Tensor:
    """The tuned field from its weights, layer by layer."""
    weights = dict(policy.state_dict())
    mean, std = weights["observation_mean"], weights["observation_std"]
    h = torch.cat([(observation - mean) / std, x.flatten(1), tau[:, None]], dim=1)
    depth = sum(name.startswith("tuned.layers") and name.endswith("weight") for name in weights)
    for i in range(depth):
        h = h @ weights[f"tuned.layers.{i}.weight"].t() + weights[f"tuned.layers.{i}.bias"]
        if i < depth - 1:
            h = F.gelu(h, approximate="tanh")
            if f"tuned.norms.{i}.weight" in weights:
                scale, shift = weights[f"tuned.norms.{i}.weight"], weights[f"tuned.norms.{i}.bias"]
                h = F.layer_norm(h, h.shape[-1:], scale, shift, eps=1e-6)
    return h.view_as(x)


class MLPContract(FlowPolicyContract):
    trains_base = True
    keeps_own_tape = True
    layer_norm = False
    hidden_dims: tuple[int, ...] = (24, 32)

    def make_policy(self) -> MLPFlowPolicy:
        torch.manual_seed(3)
        config = MLPFlowConfig(OBSERVATION, 3, 2, self.hidden_dims, self.layer_norm, 6)
        policy = MLPFlowPolicy(config, torch.randn(OBSERVATION), 0.5 + torch.rand(OBSERVATION))
        with torch.no_grad():
            for parameter in policy.tuned.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        policy.reset_base()
        return policy

    def observation(self, batch_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(batch_size, OBSERVATION, generator=generator)

    @contextmanager
    def evaluations(self, policy: FlowPolicy) -> Iterator[Counter[str]]:
        assert isinstance(policy, MLPFlowPolicy)
        counts: Counter[str] = Counter()
        if not by_kernels():
            with ExitStack() as stack:
                for name in ("base", "tuned"):
                    hook = partial(self._count, counts, name)
                    handle = getattr(policy, name).register_forward_hook(hook)
                    stack.callback(handle.remove)
                yield counts
            return
        products, first = mlp_path._products, policy.base.layers[0]

        def counted(layer: Any, inputs: Any, outputs: Any) -> None:
            if inputs[0].shape[-1] == first.in_features:  # no other layer is as wide
                for biases, blocks in zip(layer.biases, inputs, strict=True):
                    for bias, rows in zip(biases, blocks, strict=True):
                        name = "base" if torch.equal(bias[0], first.bias) else "tuned"
                        counts[name] += len(rows) // BATCH
            products(layer, inputs, outputs)

        with mock.patch.object(mlp_path, "_products", counted):
            yield counts

    @staticmethod
    def _count(counts: Counter[str], name: str, *_: Any) -> None:
        counts[name] += 1

    def host_actions(self, policy: FlowPolicy, observation: Any, noise: Tensor) -> Tensor:
        x = noise
        steps = policy.num_flow_steps
        for i in range(steps):
            tau = torch.full((len(x),), i / steps)
            x = x + plain_velocity(policy, observation, x, tau) / steps
        return x

    def host_behaviour_loss(
        self, policy: FlowPolicy, observation: Any, action: Tensor, noise: Tensor, tau: Tensor
    ) -> Tensor:
        losses = []
        for b in range(len(action)):
            x = (1 - tau[b]) * noise[b] + tau[b] * action[b]
            v = plain_velocity(policy, observation[b : b + 1], x.unsqueeze(0), tau[b : b + 1])
            losses.append(F.mse_loss(v[0], action[b] - noise[b]))
        return torch.stack(losses).mean()

    def load(self, directory: Path) -> FlowPolicy:
        return MLPFlowPolicy.from_pretrained(directory)


class TestMLPFlowPolicy(MLPContract):
    pass


class TestMLPFlowPolicyWithLayerNorm(MLPContract):
    layer_norm = True


class TestMLPFlowPolicyWithOneHiddenLayer(MLPContract):
    hidden_dims = (20,)


class TestMLPFlowPolicyByPlainTorch(MLPContract):
    layer_norm = True
    keeps_own_tape = False

    @pytest.fixture(autouse=True)
    def _plain(self) -> Iterator[None]:
        with chosen_kernels("plain"):
            yield


SIZES = [
    ((128, 128), False, 128, 10),
    ((128, 128), True, 128, 10),
    ((512, 512), False, 256, 10),
    ((33, 65, 17), True, 7, 4),
    ((256, 256, 256), False, 256, 10),
    ((64,), False, 1, 3),
]


def update_once(policy: MLPFlowPolicy, size: int) -> float:
    width, (horizon, dim) = policy.feature_dim, policy.chunk_shape
    generator = torch.Generator().manual_seed(0)
    observation, following = torch.randn(2, size, width, generator=generator)
    batch = TransitionBatch(
        observation=observation,
        action=torch.rand(size, horizon, dim, generator=generator),
        chunk_return=torch.randn(size, generator=generator),
        next_observation=following,
        discount=torch.full((size,), 0.99),
        terminated=torch.zeros(size, dtype=torch.bool),
        truncated=torch.zeros(size, dtype=torch.bool),
        valid=torch.ones(size, horizon, dtype=torch.bool),
    )
    critic = Critic(CriticEnsemble(width, horizon * dim, (32,), 2))
    method = TRQAM(policy, critic, TRQAMConfig())
    noise = UpdateNoise.draw(batch.action, policy.num_flow_steps, generator)
    return method.update_with(batch, noise).kl_estimate


@pytest.mark.parametrize(("hidden_dims", "layer_norm", "batch_size", "steps"), SIZES)
def test_the_kl_at_step_0_is_exactly_zero_at_the_sizes_people_use(
    hidden_dims: tuple[int, ...], layer_norm: bool, batch_size: int, steps: int
) -> None:
    """To the bit, although both fields may be computed in one batched product."""
    torch.manual_seed(0)
    policy = MLPFlowPolicy(MLPFlowConfig(19, 7, 5, hidden_dims, layer_norm, steps))
    assert update_once(policy, batch_size) == 0.0


@pytest.mark.parametrize("threads", [1, 3, 5, 6, 7])
def test_the_kl_at_step_0_is_exactly_zero_however_threads_split_the_work(threads: int) -> None:
    """Elementwise kernels round the ragged end of every thread's share differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        policy = MLPFlowPolicy(MLPFlowConfig(19, 7, 5, (256, 512), num_flow_steps=3))
        assert update_once(policy, 256) == 0.0
    finally:
        torch.set_num_threads(before)


def small_policy(**changes: Any) -> MLPFlowPolicy:
    torch.manual_seed(0)
    sizes = {"observation_dim": 4, "action_dim": 2, "chunk_length": 3, "hidden_dims": (8, 8)}
    return MLPFlowPolicy(MLPFlowConfig(**(sizes | changes)))


def test_observations_are_normalised_before_anything_sees_them() -> None:
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    policy = MLPFlowPolicy(MLPFlowConfig(2, 1, 1, (4,)), mean, std)
    context = policy.encode(torch.tensor([[3.0, -1.0]]))
    assert context.tolist() == [[1.0, 2.0]]
    assert torch.equal(policy.features(context), context)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3), None, "observation_mean has shape"),
        (None, torch.ones(5), "observation_std has shape"),
        (None, torch.tensor([1.0, 0.0, 1.0, 1.0]), "not positive"),
        (None, torch.tensor([1.0, torch.nan, 1.0, 1.0]), "not positive"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(
    mean: Tensor | None, std: Tensor | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MLPFlowPolicy(MLPFlowConfig(4, 2, 3, (8,)), mean, std)


def test_a_frozen_base_has_no_field_in_training() -> None:
    policy = small_policy()
    x = torch.zeros(1, 3, 2)
    assert list(policy.behaviour_parameters()) == []
    with pytest.raises(UserError, match="frozen"):
        policy.behaviour_velocity(x, torch.zeros(1), torch.zeros(1, 4))


def test_the_base_follows_the_training_base_by_its_rate() -> None:
    policy = small_policy()
    policy.start_base_training()
    old = [p.clone() for p in policy.base.parameters()]
    behaviour = list(policy.behaviour_parameters())
    with torch.no_grad():
        for parameter in behaviour:
            parameter.add_(1.0)
    policy.update_base(0.25)
    for before, now, source in zip(old, policy.base.parameters(), behaviour, strict=True):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * source)
    assert not any(p.requires_grad for p in policy.base.parameters())
    assert all(p.requires_grad for p in behaviour)


def test_a_checkpoint_holds_the_policy_and_its_normalisation_in_open_formats(
    tmp_path: Path,
) -> None:
    policy = MLPFlowPolicy(MLPFlowConfig(4, 2, 3, (8,), True, 7), torch.randn(4), torch.rand(4))
    policy.start_base_training()
    policy.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["num_flow_steps"] == 7
    loaded = MLPFlowPolicy.from_pretrained(tmp_path)
    assert loaded.config == policy.config
    assert torch.equal(loaded.observation_mean, policy.observation_mean)
    assert torch.equal(loaded.observation_std, policy.observation_std)
    assert loaded.behaviour is None


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors does not exist"),
    "config is not JSON": (lambda f: _write(f / "config.json", "{"), "is not JSON"),
    "config is no object": (lambda f: _write(f / "config.json", "[1]"), "is not a JSON object"),
    "another policy": (lambda f: edit_config(f, type="pi0"), "not an MLP flow policy"),
    "a field is missing": (lambda f: edit_config(f, action_dim=None), "action_dim"),
    "an unknown field": (lambda f: edit_config(f, dropout=0.1), "dropout"),
    "wider action": (lambda f: edit_config(f, action_dim=5), "the config says"),
    "other observation": (lambda f: edit_config(f, observation_dim=9), "the config says"),
    "a layer too many": (lambda f: edit_config(f, hidden_dims=[8, 8, 8]), "missing"),
    "layer norm missing": (lambda f: edit_config(f, layer_norm=True), "missing"),
    "weights are no safetensors": (
        lambda f: _write(f / "model.safetensors", "nonsense"),
        "not a readable safetensors file",
    ),
    "weights cut off": (
        lambda f: _truncate(f / "model.safetensors"),
        "not a readable safetensors file",
    ),
    "a weight is missing": (
        lambda f: edit_weights(f, lambda t: _drop(t, "tuned.layers.0.bias")),
        "tuned.layers.0.bias",
    ),
    "a weight too many": (
        lambda f: edit_weights(f, lambda t: t.update({"tuned.extra": torch.zeros(1)})),
        "tuned.extra",
    ),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(
    name: str, tmp_path: Path
) -> None:
    breaking, message = BROKEN[name]
    small_policy().save_pretrained(tmp_path)
    breaking(tmp_path)
    with pytest.raises(UserError) as error:
        MLPFlowPolicy.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)

"""Two processes reach what one reaches with the same rows and noise."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import CONFIG, SCENARIOS, Place, bfloat16_accelerator, fork_two, write_all
from safetensors.torch import load_file
from torch import Tensor, nn
from update_problems import (
    ACTION,
    BATCH,
    HORIZON,
    OBSERVATION,
    STEPS,
    batch_of,
    method_of,
    noise_of,
)
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.engine.processes.team import Team
from vla_trqam.errors import UserError
from vla_trqam.methods.parts.adjoint_matching import micro_batches
from vla_trqam.methods.parts.parallel import Ranks, whole
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig
from vla_trqam.policy import PathFields

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

Found = dict[str, Tensor]


def of_rank(folder: Path, name: str, rank: int) -> Found:
    return load_file(folder / f"{name}.{rank}.safetensors")


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left every scenario."""
    folder = tmp_path_factory.mktemp("two_processes")
    SCENARIOS["updates"](Place())  # what it imports, both need not
    fork_two(partial(write_all, folder=folder))
    return folder


def equal(first: Found, second: Found) -> list[str]:
    """Names whose values differ in a bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


METHODS = [name for name in SCENARIOS if name != "team_work"]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_reach_the_weights_lambda_and_metrics_of_one(two: Path, name: str) -> None:
    found, expected = of_rank(two, name, 0), SCENARIOS[name](Place())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_weights_lambda_its_average_and_metrics_are_equal_on_both_ranks(
    two: Path, name: str
) -> None:
    assert equal(of_rank(two, name, 0), of_rank(two, name, 1)) == []


def test_the_team_shares_work_gathers_it_and_tells_of_failures(two: Path) -> None:
    found, alone = of_rank(two, "team_work", 0), SCENARIOS["team_work"](Place())
    assert equal(found, of_rank(two, "team_work", 1)) == []
    assert found["order"].tolist() == alone["order"].tolist()
    assert found["names"].tolist() == [0, 11]
    for name in ("distinct", "first_is_as_alone", "told", "batch", "failure", "together", "any"):
        assert torch.equal(found[name], alone[name]), name
    assert bool(found["distinct"])
    assert bool(found["failure"])
    assert bool(found["together"])
    assert found["any"].tolist() == [True, False]


def test_both_ranks_stop_for_a_bad_row_of_one_before_anything_has_moved(two: Path) -> None:
    for rank in (0, 1):
        assert of_rank(two, "spoilt_on_one_rank", rank)["stops"].tolist() == [2.0, 1.0]


def test_lambda_has_moved_and_the_ranks_shares_differ(two: Path) -> None:
    """Otherwise the comparisons above would show nothing."""
    assert abs(float(of_rank(two, "updates", 0)["lam"]) - CONFIG.lam_init) > 0.01
    assert Place().rows == slice(0, BATCH)


@pytest.mark.parametrize("count", [2, 5, BATCH])
def test_micro_batches_make_the_update_of_the_joint_batch(count: int) -> None:
    joint, split = (method_of(TRQAMConfig(train_base=True, kl_budget=0.02)) for _ in range(2))
    for step in range(2):
        batch, noise = batch_of(step), noise_of(step)
        batch.valid[:3, -1] = False
        expected = joint.update_with(batch, noise).metrics()
        found = split.update_in_parts(micro_batches(batch, noise, count)).metrics()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for mine, other in zip(split.loss.parameters(), joint.loss.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5)
    assert split.trust_region.lam == pytest.approx(joint.trust_region.lam, rel=1e-6)


def test_micro_batches_split_dictionaries_and_texts_row_by_row() -> None:
    texts = [str(i) for i in range(BATCH)]
    observation = {"state": torch.arange(BATCH), "task": texts}
    batch = batch_of(observation=observation, next_observation=observation)
    parts = micro_batches(batch, noise_of(), 5)
    assert [len(part) for part, _ in parts] == [2, 2, 3, 2, 3]
    assert [text for part, _ in parts for text in part.observation["task"]] == texts
    joined = torch.cat([noise.sde_steps for _, noise in parts], dim=1)
    assert torch.equal(joined, noise_of().sde_steps)
    with pytest.raises(UserError, match="12 rows cannot be split in 13"):
        micro_batches(batch, noise_of(), BATCH + 1)


def test_bfloat16_leaves_networks_written_by_hand_in_float32() -> None:
    plain = method_of()
    made = method_of()
    mixed = TRQAM(made.policy, made.critic, TRQAMConfig(), bfloat16_accelerator())
    for step in range(2):
        expected = plain.update_with(batch_of(step), noise_of(step)).metrics()
        assert mixed.update_with(batch_of(step), noise_of(step)).metrics() == expected
        expected = plain.update_critic_with(batch_of(step), noise_of(step)).metrics()
        assert mixed.update_critic_with(batch_of(step), noise_of(step)).metrics() == expected


def test_a_critic_under_autocast_is_the_critic_to_the_bit() -> None:
    critic = method_of().critic
    features = torch.randn(4, OBSERVATION)
    action = 0.1 * torch.randn(4, HORIZON, ACTION)

    def all_of_it() -> list[Tensor]:
        critic.zero_grad()
        q = critic.online(features, action)
        q.square().mean().backward()
        gradients = [p.grad.clone() for p in critic.online.parameters() if p.grad is not None]
        return [q.detach(), *critic.action_gradient(features, action), *gradients]

    expected = all_of_it()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_of_it()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert critic.online(features.bfloat16(), action).dtype == torch.float32


class LibraryPolicy(MLPFlowPolicy):
    """A field of stock modules with the plain evaluations along a path: autocast rounds it."""

    def __init__(self, config: MLPFlowConfig) -> None:
        super().__init__(config)
        width = OBSERVATION + HORIZON * ACTION + 1
        self.tuned = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, HORIZON * ACTION))  # type: ignore[assignment]
        self.base = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, HORIZON * ACTION))  # type: ignore[assignment]
        self.base.requires_grad_(False)

    def path_fields(
        self, context: Tensor, next_context: Tensor, *, keep_activations: bool = True
    ) -> PathFields:
        return PathFields(self, context, next_context, keep_activations=keep_activations)


def test_fields_that_autocast_rounds_give_float32_paths_and_gradients() -> None:
    results = []
    for accelerator in (None, bfloat16_accelerator()):
        torch.manual_seed(0)
        shape = MLPFlowConfig(OBSERVATION, ACTION, HORIZON, num_flow_steps=STEPS)
        critic = Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (24,), 3))
        method = TRQAM(LibraryPolicy(shape), critic, TRQAMConfig(), accelerator)
        result = method.update_with(batch_of(), noise_of())
        gradient = torch.cat([p.grad.flatten() for p in method.policy.tuned.parameters()])
        results.append((result.kl_estimate, gradient))
        assert result.output.adjoint.dtype == torch.float32
        assert result.output.kl_per_step.dtype == torch.float32
    (kl, gradient), (rounded_kl, rounded) = results
    assert rounded_kl != kl
    assert rounded_kl == pytest.approx(kl, rel=0.02)
    assert float(torch.cosine_similarity(gradient, rounded, dim=0)) > 0.999


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'"),
        ({"distributed_type": SimpleNamespace(value="FSDP")}, "accelerate is set to FSDP"),
    ],
)
def test_an_accelerator_that_asks_for_more_is_refused(
    changes: dict[str, object], sentence: str
) -> None:
    accelerator = SimpleNamespace(**vars(bfloat16_accelerator()) | changes)
    with pytest.raises(UserError, match=sentence):
        Ranks(accelerator)


def test_one_process_has_nothing_to_shard_and_a_batch_holds_a_row_for_each() -> None:
    with pytest.raises(UserError, match="one process only"):
        Ranks(shard=True)
    two = SimpleNamespace(**vars(bfloat16_accelerator()) | {"num_processes": 2})
    with pytest.raises(UserError, match="--batch_size=1 is the size of the whole batch"):
        Team(two).batch_share(1)
    with whole(method_of().loss):
        pass


def test_what_is_sent_lies_on_the_device_that_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    # NCCL knows the accelerator's device only; meta stands for it, and nn.Linear lies elsewhere.
    changes = {"num_processes": 2, "device": torch.device("meta")}
    ranks = Ranks(SimpleNamespace(**vars(bfloat16_accelerator()) | changes))
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor))
    with pytest.raises(NotImplementedError, match="meta"):  # nothing comes back from there
        ranks.synchronize(nn.Linear(2, 2))
    assert [tensor.device.type for tensor in sent] == ["meta"]


@pytest.mark.parametrize(
    ("batch_size", "processes", "fraction"),
    [(32, 8, 0.1), (4, 4, 0.5), (12, 4, 0.5), (7, 3, 0.5), (5, 5, 0.0), (9, 2, 1.0), (8, 1, 0.3)],
)
def test_the_ranks_online_rows_add_up_to_those_of_the_whole_batch(
    batch_size: int, processes: int, fraction: float
) -> None:
    online = []
    for rank in range(processes):
        changes = {"num_processes": processes, "process_index": rank}
        team = Team(SimpleNamespace(**vars(bfloat16_accelerator()) | changes))
        rows, share = team.batch_share(batch_size), team.fraction_share(fraction, batch_size)
        online.append(round(rows * share))
        assert 0 <= online[-1] <= rows
    assert sum(online) == round(batch_size * fraction)
    assert max(online) - min(online) <= 1

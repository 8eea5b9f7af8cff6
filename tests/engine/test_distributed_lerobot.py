"""LeRobot policies in two processes, sharded and in bfloat16."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

from distributed_worker import Place, bfloat16_accelerator, fork_two, trained, write
from lerobot_contract import ACTION, make_policy, raw_observation
from vla_trqam.adapters.loading import load_policy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.folder.state import (
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
)
from vla_trqam.engine.processes.team import Team
from vla_trqam.methods.parts.off_policy import rows_of
from vla_trqam.methods.trqam import TRQAM, LossOutput, TRQAMConfig, UpdateNoise

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

ROWS, CUT, KIND = 3, 2, "tiny_pi0"
CONFIG = TRQAMConfig(kl_budget=0.02, dual_step_size=1.0, actor_lr=1e-3)


def whole_batch(method: TRQAM, step: int) -> tuple[TransitionBatch, UpdateNoise]:
    """As a recipe has it: raw pictures and instructions, executed actions in the flow's space."""
    policy, generator = method.policy, torch.Generator().manual_seed(step)
    horizon = policy.chunk_shape[0]
    done = torch.zeros(ROWS, dtype=torch.bool)
    batch: TransitionBatch = TransitionBatch(
        observation=raw_observation(ROWS, step),  # type: ignore[arg-type]
        action=policy.from_robot(torch.rand(ROWS, horizon, ACTION, generator=generator) - 0.5),
        chunk_return=torch.randn(ROWS, generator=generator),
        next_observation=raw_observation(ROWS, 50 + step),  # type: ignore[arg-type]
        discount=torch.full((ROWS,), 0.9),
        terminated=done,
        truncated=done,
        valid=torch.ones(ROWS, horizon, dtype=torch.bool),
    )
    return batch, UpdateNoise.draw(batch.action, policy.num_flow_steps, generator)


def method_of(lora: bool, accelerator: object = None, *, shard: bool = False) -> TRQAM:
    policy = make_policy(KIND, lora=lora)
    torch.manual_seed(7)
    numbers = policy.chunk_shape[0] * ACTION
    critic = Critic(CriticEnsemble(policy.feature_dim, numbers, (16, 16), 2))
    return TRQAM(policy, critic, CONFIG, accelerator, shard=shard)  # type: ignore[arg-type]


def run(method: TRQAM) -> dict[str, Tensor]:
    """Two whole updates around one of the critic; only what is trained is returned."""
    history = []
    updates = (method.update_with, method.update_critic_with, method.update_with)
    for step, update in enumerate(updates):
        team = method.ranks
        rows = slice(0, ROWS)
        if team.count == 2:
            rows = slice(0, CUT) if team.index == 0 else slice(CUT, ROWS)
        batch, noise = whole_batch(method, step)
        history.append(update(rows_of(batch, rows), noise.rows(rows)).metrics())
    names = {f"policy.{n}" for n, p in method.policy.named_parameters() if p.requires_grad}
    found = trained(method, history)
    return {k: v for k, v in found.items() if not k.startswith("policy.") or k in names}


def lora(folder: Path, accelerator: object = None) -> dict[str, Tensor]:
    return run(method_of(True, accelerator))


def sharded(folder: Path, accelerator: object = None) -> dict[str, Tensor]:
    """The action expert in full, in parts, with a checkpoint written by the main process."""
    team = Team(accelerator)  # type: ignore[arg-type]
    method = method_of(False, accelerator, shard=team.size > 1)
    found = run(method)
    with method.whole_weights():
        team.on_main(lambda: method.policy.save_pretrained(folder / f"saved_by_{team.size}"))
    resumed = method_of(False, accelerator, shard=team.size > 1)
    restore(resumed, method)
    for again, tensors in (("on", run(method)), ("resumed", run(resumed))):
        found |= {f"{again}.{key}": value for key, value in tensors.items()}
    return found


def restore(learner: TRQAM, other: TRQAM) -> None:
    """One learner's state, as a checkpoint holds it, in another."""
    with other.whole_weights(moments=True):
        networks, moments = module_tensors(other), optimizer_tensors(other.optimizer)
        networks, moments = ({k: v.clone() for k, v in t.items()} for t in (networks, moments))
    load_module_tensors(learner, networks)
    load_optimizer_tensors(learner.optimizer, moments)
    learner.load_scalars(other.scalars())


SCENARIOS: dict[str, Callable[..., dict[str, Tensor]]] = {"lora": lora, "sharded": sharded}


def write_all(place: Place, folder: Path) -> None:
    for name, scenario in SCENARIOS.items():
        write(folder, name, place.team.rank, scenario(folder, place.accelerator))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left every scenario."""
    folder = tmp_path_factory.mktemp("two_processes")
    for with_lora in (True, False):
        make_policy(KIND, lora=with_lora)
    fork_two(partial(write_all, folder=folder))
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_reach_what_one_reaches(two: Path, name: str) -> None:
    expected = SCENARIOS[name](two)
    found, other = (load_file(two / f"{name}.{index}.safetensors") for index in range(2))
    assert found.keys() == other.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], other[key])] == []
    for key, value in expected.items():
        close(found[key], value, key)


def close(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}"
    )


def test_a_sharded_run_saves_the_gathered_weights_and_goes_on_as_if_it_had_not_stopped(
    two: Path,
) -> None:
    found = load_file(two / "sharded.0.safetensors")
    saved = dict(load_policy(two / "saved_by_2", lora=None).named_parameters())
    names = [n.removeprefix("policy.") for n in found if n.startswith("policy.")]
    assert len(names) > 10
    assert [n for n in names if not torch.equal(saved[n], found[f"policy.{n}"])] == []
    on = [key for key in found if key.startswith("on.")]
    assert [k for k in on if not torch.equal(found[k], found[f"resumed.{k[3:]}"])] == []
    assert not torch.equal(found["on.ema"], found["ema"])


@pytest.mark.parametrize("with_lora", [True, False])
def test_networks_in_bfloat16_train_as_in_float32(with_lora: bool) -> None:
    """A product rounds to 2**-9; some fifty in a row make 1% of a gradient, at random angles."""
    plain, rounded = method_of(with_lora), method_of(with_lora, bfloat16_accelerator())
    for step in range(3):
        batch, noise = whole_batch(plain, step + 1)
        results = [method.update_with(batch, noise) for method in (plain, rounded)]
        if step == 0:
            clipped = [result.output.terminal_adjoint == 0.0 for result in results]
            assert torch.equal(*clipped), "a number that rounding moves over a limit is no test"
            first, second = gradient(plain), gradient(rounded)
            assert float(torch.cosine_similarity(first, second, dim=0)) > 0.999
        expected, found = (result.metrics() for result in results)
        # What rounding alone makes of the difference of two nearly equal fields.
        assert found["kl_estimate"] == pytest.approx(expected["kl_estimate"], rel=0.05, abs=5e-4)
        assert found["td_loss"] == pytest.approx(expected["td_loss"], rel=0.05)
        assert (found["kl_estimate"] == 0.0) is (step == 0)
        assert dtypes(results[1].output) == {torch.float32}


def gradient(method: TRQAM) -> Tensor:
    """Of the actor."""
    grads = [p.grad.flatten() for p in method.policy.trainable_parameters() if p.grad is not None]
    return torch.cat(grads)


def dtypes(output: LossOutput) -> set[torch.dtype]:
    tensors = [v for v in vars(output).values() if isinstance(v, Tensor)]
    return {tensor.dtype for tensor in [*tensors, output.trajectory.x]}

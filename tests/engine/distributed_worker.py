"""What one process of a distributed test does.

Every scenario is a function of the process's place. Alone it works on the whole batch; among others
on its rows of it. All return named tensors that must agree.
"""

import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate  # noqa: F401 - before the fork, not after it in both processes
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from update_problems import BATCH, STEPS, batch_of, method_of, noise_of

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.folder.state import module_tensors
from vla_trqam.engine.processes.team import (
    FailedElsewhereError,
    Team,
    make_accelerator,
)
from vla_trqam.errors import DivergenceError, UserError
from vla_trqam.methods.cgql import CGQLLConfig
from vla_trqam.methods.dsrl import DSRLConfig
from vla_trqam.methods.fql import FQLConfig
from vla_trqam.methods.ifql import IFQLConfig
from vla_trqam.methods.parts.adjoint_matching import micro_batches
from vla_trqam.methods.parts.off_policy import OffPolicyConfig, SummedLosses, rows_of
from vla_trqam.methods.qam_e import QAME, QAMEConfig
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.residual import ResidualConfig
from vla_trqam.methods.sac_flow import SACFlowConfig
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise

CUT = 7
"""Rank 0 has the rows before it, rank 1 those from it on: different numbers of them."""

CONFIG = TRQAMConfig(kl_budget=0.02, dual_step_size=1.0)


class Place:
    """A process: the accelerator that it has, and its rows of every batch."""

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.team = Team(accelerator)
        alone = self.team.size == 1
        self.rows = slice(0, BATCH) if alone else (slice(0, CUT), slice(CUT, BATCH))[self.team.rank]

    def share(self, step: int) -> tuple[TransitionBatch, UpdateNoise]:
        return rows_of(batch_with_short_chunks(step), self.rows), noise_of(step).rows(self.rows)

    def method(self, config: TRQAMConfig = CONFIG, *, shard: bool = False) -> TRQAM:
        made = method_of(config)
        shard = shard and self.team.size > 1
        return TRQAM(made.policy, made.critic, config, self.accelerator, shard=shard)


def bfloat16_accelerator() -> Any:
    """What an update asks of an accelerator; a real one is a state of the whole process."""
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        mixed_precision="bf16",
        distributed_type=SimpleNamespace(value="NO"),
    )


def batch_with_short_chunks(step: int) -> TransitionBatch:
    """Rows that weigh nothing in the TD loss, unevenly over the ranks."""
    batch = batch_of(step)
    batch.valid[: 2 + step, -1] = False
    batch.valid[CUT : CUT + 1, -1] = False
    return batch


def trained(method: TRQAM, history: list[dict[str, float]]) -> dict[str, Tensor]:
    """Weights, lambda, its average and all metrics."""
    region = method.trust_region
    with method.whole_weights():
        found = {f"policy.{k}": v.clone() for k, v in method.policy.state_dict().items()}
        found |= {f"critic.{k}": v.clone() for k, v in method.critic.state_dict().items()}
    for step, metrics in enumerate(history):
        found |= {f"{step}.{k}": torch.tensor(v).double() for k, v in metrics.items()}
    found |= {"lam": torch.tensor(region.lam).double(), "ema": torch.tensor(region.kl_ema).double()}
    return found


def run_updates(place: Place, method: TRQAM) -> dict[str, Tensor]:
    """Updates of everything and of the critic alone, in turn."""
    history = []
    for step in range(3):
        history.append(method.update_with(*place.share(step)).metrics())
        history.append(method.update_critic_with(*place.share(10 + step)).metrics())
    return trained(method, history)


def updates(place: Place) -> dict[str, Tensor]:
    return run_updates(place, place.method())


def one_clip_and_a_base_in_training(place: Place) -> dict[str, Tensor]:
    config = TRQAMConfig(shared_optimizer=True, train_base=True, kl_budget=0.02)
    return run_updates(place, place.method(config))


def accumulated(place: Place) -> dict[str, Tensor]:
    """As `updates`, in micro-batches of different sizes; alone, in one."""
    method, history = place.method(), []
    for step in range(3):
        batch, noise = place.share(step)
        parts = micro_batches(batch, noise, 1 if place.team.size == 1 else 2)
        history.append(method.update_in_parts(parts).metrics())
        history.append(method.update_critic_with(*place.share(10 + step)).metrics())
    return trained(method, history)


def sharded(place: Place) -> dict[str, Tensor]:
    method = place.method(shard=True)
    return run_updates(place, method)


def edited(place: Place) -> dict[str, Tensor]:
    """QAM-E: networks, noise and terms of its own; the ranks' edits come with other weights."""
    made = method_of(CONFIG)
    torch.manual_seed(10 + place.team.rank)
    config = QAMEConfig(edit_hidden_dims=(16,), edit_scale=0.5)
    method = QAME(made.policy, made.critic, config, place.accelerator)
    history = []
    for step in range(3):
        batch = batch_with_short_chunks(step)
        noise = method.loss.draw(batch.action, STEPS, torch.Generator().manual_seed(step))
        share = rows_of(batch, place.rows), noise.rows(place.rows)
        history.append(method.update_with(*share).metrics())
        history.append(method.update_critic_with(*share).metrics())
    own = {k: v.clone() for k, v in method.loss.own.state_dict().items()}
    return trained(method, history) | own


def started_apart(place: Place) -> dict[str, Tensor]:
    """The ranks come with different weights."""
    made = method_of(CONFIG)
    with torch.no_grad():
        for parameter in [*made.policy.parameters(), *made.critic.parameters()]:
            parameter.add_(0.1 * place.team.rank)
    return run_updates(place, TRQAM(made.policy, made.critic, CONFIG, place.accelerator))


def with_an_unused_weight(place: Place) -> dict[str, Tensor]:
    """No evaluation asks for it: nothing may wait for its gradient."""
    made = method_of(CONFIG)
    made.policy.idle = nn.Parameter(torch.ones(3))
    method = TRQAM(made.policy, made.critic, CONFIG, place.accelerator)
    return run_updates(place, method)


def spoilt_on_one_rank(place: Place) -> dict[str, Tensor]:
    """A row of the last rank makes all of them stop, with nothing moved, and go on alike."""
    method, stops = place.method(), 0
    method.update_with(*place.share(0))
    before = trained(method, [])
    bad, noise = batch_with_short_chunks(1), noise_of(1)
    bad.chunk_return[BATCH - 1] = torch.nan
    bad.valid[BATCH - 1], bad.terminated[BATCH - 1] = True, True
    for update in (method.update_with, method.update_critic_with):
        try:
            update(rows_of(bad, place.rows), noise.rows(place.rows))
        except DivergenceError:
            stops += 1
    kept = all(torch.equal(value, before[name]) for name, value in trained(method, []).items())
    return run_updates(place, method) | {"stops": torch.tensor([stops, kept]).double()}


def team_work(place: Place) -> dict[str, Tensor]:
    """What a recipe asks of its team; the same tensors on every rank."""
    team = place.team
    seeds = list(range(5))
    done = team.gather_shares([[seed, seed * 0.5] for seed in team.share(seeds)])
    names = team.gather({"rank": team.rank, "text": "ä" * team.rank})
    firsts = [float(torch.rand((), generator=team.generators(3, torch.device("cpu")).noise))]
    drawn = [value for values in team.gather(firsts) for value in values]
    told = team.on_main(lambda: {"steps": 7})
    return {
        "order": torch.tensor(done),
        "names": torch.tensor([entry["rank"] * 10 + len(entry["text"]) for entry in names]),
        "distinct": torch.tensor(len(set(drawn)) == team.size),
        "first_is_as_alone": torch.tensor(drawn[0]),
        "told": torch.tensor(told["steps"]),
        "batch": torch.tensor(sum(team.gather(team.batch_share(9)))),
        "failure": torch.tensor(_failure(team)),
        "together": torch.tensor(_together(team)),
        "any": torch.tensor([team.any(team.rank == team.size - 1), team.any(False)]),
    }


def _failure(team: Team) -> bool:
    """Whether an error on the main process is one on all."""

    def fail() -> None:
        raise UserError("the disk is full")

    try:
        team.on_main(fail)
    except UserError as error:
        return all(team.gather(str(error) == "the disk is full"))
    return False


def _together(team: Team) -> bool:
    """Whether an error on the last process is one on all, and the main one says where it was."""
    last = team.size - 1

    def fail() -> str:
        if team.rank == last:
            raise UserError("no camera")
        return "done"

    def said() -> str:
        try:
            return team.together(fail)
        except UserError as error:
            return str(error)

    def breaks() -> None:
        if team.rank == last:
            raise OSError("no space")

    def told() -> bool:
        try:
            team.together(breaks)
        except OSError:
            return team.rank == last
        except FailedElsewhereError:
            return team.rank != last
        return False

    expected = f"process {last}: no camera" if last else "no camera"
    fine = team.together(lambda: team.rank) == team.rank
    return fine and all(team.gather(said() == expected)) and all(team.gather(told()))


def beside_the_flow(config: OffPolicyConfig, place: Place) -> dict[str, Tensor]:
    """Updates of a method that acts by networks of its own; a base in training, micro-batches."""
    made = method_of(CONFIG)
    torch.manual_seed(10 + place.team.rank)  # the ranks' networks come with different weights
    if place.team.rank == 0:
        torch.manual_seed(10)
    method = make_method(made.policy, made.critic, config, place.accelerator)
    assert isinstance(method, SummedLosses)
    history = []
    for step in range(3):
        batch = batch_with_short_chunks(step)
        draws = method.draw(batch, torch.Generator().manual_seed(step))
        own = {name: value[place.rows] for name, value in draws.items()}
        parts = 1 if place.team.size == 1 else 2
        method.update_from(rows_of(batch, place.rows), own, num_parts=parts)
        history.append(method.metrics())
    found = {k: v.clone() for k, v in module_tensors(method).items()}
    for step, metrics in enumerate(history):
        found |= {f"{step}.{k}": torch.tensor(v).double() for k, v in metrics.items()}
    return found


BESIDE = {
    "fql": FQLConfig(hidden_dims=(16,), train_base=True),
    "ifql": IFQLConfig(train_base=True, max_grad_norm=0.5),
    "dsrl": DSRLConfig(hidden_dims=(16,)),
    "residual": ResidualConfig(edit_hidden_dims=(16,), train_base=True),
    "cgql_l": CGQLLConfig(train_base=True, noisy_weight=0.1),
    "sac_flow": SACFlowConfig(hidden_dims=(16,), gate_dim=4),
}

SCENARIOS: dict[str, Callable[[Place], dict[str, Tensor]]] = {
    name: partial(beside_the_flow, config) for name, config in BESIDE.items()
} | {
    function.__name__: function
    for function in (
        updates,
        one_clip_and_a_base_in_training,
        accumulated,
        sharded,
        edited,
        started_apart,
        with_an_unused_weight,
        spoilt_on_one_rank,
        team_work,
    )
}


def write(folder: Path, name: str, rank: int, tensors: dict[str, Tensor]) -> None:
    whole = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(whole, folder / f"{name}.{rank}.safetensors")


def fork_two(run: Callable[[Place], None]) -> None:
    """Runs this in two processes, placed as a launcher places them; imports are made already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, run), nprocs=2, start_method="fork")


def _rank(index: int, port: int, run: Callable[[Place], None]) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # A test before may have used accelerate, alone; the fork remembers it.
    AcceleratorState._reset_state(reset_partial_state=True)
    run(Place(make_accelerator(cpu=True)))
    torch.distributed.barrier()
    # Everything is written. Tearing gloo down aborts now and then, on a thread that nobody joined.
    os._exit(0)


def write_all(place: Place, folder: Path) -> None:
    for name, scenario in SCENARIOS.items():
        write(folder, name, place.team.rank, scenario(place))

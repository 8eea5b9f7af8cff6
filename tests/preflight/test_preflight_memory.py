"""What is trained, what that takes of memory and disk, and what there is."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preflight_problems import ACTION, EXECUTED, STATE, make_policy, make_replay, plan_of, reader_of
from torch import nn

from vla_trqam.methods.trqam import TRQAMConfig
from vla_trqam.preflight import disk, memory
from vla_trqam.preflight.live_bytes import LiveBytes
from vla_trqam.preflight.model import repeated
from vla_trqam.preflight.report import Finding


@pytest.fixture
def policy() -> Any:
    return make_policy()


@pytest.mark.slow
def test_trained_frozen_and_copied_parameters_are_counted() -> None:
    adapters, full = make_policy(lora=True), make_policy(lora=False)
    trained = sum(p.numel() for p in adapters.trainable_parameters())
    found = memory.check_parameters(adapters).found
    assert f"adapters: {trained:,} trained" in found
    assert ", 0 copied for the base (0 B)" in found
    expert = sum(p.numel() for p in full.trainable_parameters())
    assert f"{expert:,} trained" in memory.check_parameters(full).found
    assert f"{expert:,} copied for the base" in memory.check_parameters(full).found


@pytest.mark.slow
def test_adapters_with_a_second_copy_and_nothing_trained_are_refused() -> None:
    policy = make_policy()
    policy.base = copy.deepcopy(make_policy(lora=False).base)
    assert "the base is the adapters switched off" in memory.check_parameters(policy).remedy
    policy = make_policy().requires_grad_(False)
    assert not memory.check_parameters(policy).ok
    assert "0 trained" in memory.check_parameters(policy).found


def test_a_gradient_that_does_not_arrive_is_refused() -> None:
    policy: Any = SimpleNamespace(trainable_parameters=lambda: [torch.zeros(1)] * 3)
    good = memory.DryPass(prefix=0, activations=0, reached=2, finite=True)
    assert memory.check_gradient(good, policy).found.endswith("reaches 2 of 3 trained tensors")
    for reached, finite in ((0, True), (3, False)):
        dry = memory.DryPass(prefix=0, activations=0, reached=reached, finite=finite)
        assert not memory.check_gradient(dry, policy).ok


def test_saved_bytes_are_what_autograd_keeps() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    with memory.saved_bytes({p.untyped_storage().data_ptr() for p in layer.parameters()}) as saved:
        y = torch.sin(layer(x)).sum()  # the layer keeps x, the sine its argument
    y.backward()
    assert sum(saved.values()) == (4 * 8 + 4 * 16) * 4
    assert layer.weight.grad is not None


NEEDS = memory.Memory(weights=10**6, gradients=100, optimizer=200, activations=50, prefix=5)


def look(available: int | None, rows: int, micro_batches: int = 1, **where: Any) -> Finding:
    processes = where.pop("processes", 1)
    share = memory.Share(rows, micro_batches, processes)
    return memory.check_memory(NEEDS, available, share, where.pop("device", "cpu"))


def test_the_micro_batches_that_are_said_to_fit_do() -> None:
    failure = look(1000, 12)
    assert not failure.ok
    assert "activations of 12 600 B, prefixes of 12 120 B" in failure.found
    assert failure.remedy == "--micro_batches=2 or more"
    assert look(1000, 12, 2).ok  # 300 + 12 * 10 + 6 * 50
    assert "this is close" in look(1000, 12, 2).found
    assert "this is close" not in look(2000, 12, 2).found
    assert look(1000, 12, 5).found.startswith("weights")
    assert "activations of 3 " in look(1000, 12, 5).found


def test_the_batch_that_is_said_to_fit_does() -> None:
    failure = look(1000, 80)  # 300 and 50 for one row at a time, 10 for each row
    rows, parts = re.fullmatch(r"--batch_size=(\d+) --micro_batches=(\d+)", failure.remedy).groups()
    assert int(rows) == int(parts) == (1000 - 350) // 10
    assert look(1000, int(rows), int(parts)).ok
    assert not look(1000, int(rows) + 1, int(parts) + 1).ok
    assert "adapters instead" in look(310, 1).remedy
    assert "is not known" in look(None, 1, device="mps").found


def test_recordings_keep_gradients_and_prefixes_beside_an_update() -> None:
    share = memory.Share(12, 4, recorded=True)
    kept = 2 * 100 + (3 * 3 + 12) * 5 + 3 * 50 // 2
    assert NEEDS.of(share) == NEEDS.of(memory.Share(12, 4)) + kept
    room = NEEDS.of(share)
    assert memory.check_memory(NEEDS, room, share, "cuda").ok
    failure = memory.check_memory(NEEDS, room - 1, share, "cuda")
    assert f"recordings {kept} B" in failure.found
    assert failure.remedy == "--micro_batches=6 or more"


def test_a_recorded_batch_that_is_said_to_fit_does() -> None:
    failure = memory.check_memory(NEEDS, 1000, memory.Share(80, 80, recorded=True), "cuda")
    rows = int(failure.remedy.partition("--micro_batches=")[2])
    fitting, larger = (memory.Share(n, n, recorded=True) for n in (rows, rows + 1))
    assert NEEDS.of(fitting) <= 1000 < NEEDS.of(larger)


def test_processes_share_a_cpus_memory_and_have_an_accelerator_each() -> None:
    alone = look(1000, 11)
    assert alone.ok
    assert "times" not in alone.found
    both = look(1000, 11, processes=2)
    assert not both.ok
    assert ", times 2 processes: " in both.found
    assert look(1000, 11, processes=2, device="cuda").ok
    assert look(2000, 11, processes=2).ok
    huge = look(1000, 40, processes=2)
    assert huge.remedy == "--batch_size=30 --micro_batches=15"
    assert look(1000, 15, 15, processes=2).ok


@pytest.mark.slow
def test_memory_counts_adam_and_the_critic(policy: Any, tmp_path: Path) -> None:
    replay, critic = make_replay(tmp_path / "replay"), nn.Linear(10, 10)
    dry = memory.dry_pass(policy, reader_of(replay).first_observation(), TRQAMConfig())
    alone, both = (memory.measure_memory(policy, c, dry) for c in (None, critic))
    trained = sum(p.numel() for p in policy.trainable_parameters())
    assert alone.gradients == 4 * trained
    assert both.gradients == 4 * (trained + 110)
    assert both.optimizer == 2 * both.gradients
    assert both.weights == alone.weights + 440
    packed = policy.packed(policy.processors.observe(replay.observation_at(np.array([0]))))
    assert dry.prefix == sum(value.nbytes for value in packed.values())
    many = repeated(reader_of(replay).first_observation(), 3 * policy.encoded_at_once)
    with LiveBytes() as live:
        made = policy.packed(many)
    beyond = live.peak - memory.tensor_bytes(made.values())
    assert alone.encoding == pytest.approx(beyond, rel=0.02)
    share, recorded = memory.Share(1), memory.Share(1, recorded=True)
    for each, beyond in ((share, alone.encoding - alone.activations), (recorded, alone.encoding)):
        assert beyond > 0  # of one row the path takes less
        assert alone.of(each) - replace(alone, encoding=0).of(each) == beyond
        words = memory.in_words(beyond)
        assert f"their pass {words}" in memory.check_memory(alone, 10**12, each, "cpu").found
    large = memory.Share(10**6)
    assert alone.of(large) == replace(alone, encoding=0).of(large)
    assert "their pass" not in memory.check_memory(alone, 10**12, large, "cpu").found
    assert dry.activations > 0


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"keep_activations": False}])
def test_copies_of_weights_in_bfloat16_are_counted_once_and_not_by_row(
    policy: Any, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    """Of an update of five rows as of thirteen: what autograd keeps of them, counted."""
    replay = make_replay(tmp_path / "replay")
    seen, config = reader_of(replay).first_observation(), TRQAMConfig(**knobs)

    def half() -> Any:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    dry = memory.dry_pass(policy, seen, config, half)
    assert dry.copies > 0
    assert memory.dry_pass(policy, seen, config).copies == 0
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    for rows in (5, 13):
        many = {
            k: v * rows if isinstance(v, list) else v.repeat_interleave(rows, 0)
            for k, v in seen.items()
        }
        observation = policy.processors.observe(many)
        with half():
            context = policy.encode(observation)
            with memory.saved_bytes(own) as saved:
                rehearsal = config.rehearse(policy, context, rows)
        kept = sum(saved.values()) / rehearsal.parts
        assert dry.copies + rows * dry.activations == pytest.approx(kept, rel=0.01)
    needs = memory.measure_memory(policy, None, dry)
    alone = replace(needs, copies=0)
    share = memory.Share(8, micro_batches=4)
    assert needs.of(share) - alone.of(share) == dry.copies
    assert "weights in bfloat16" in memory.check_memory(needs, 10**12, share, "cpu").found


@pytest.mark.slow
def test_activations_are_those_of_the_chain_that_is_trained_on(policy: Any, tmp_path: Path) -> None:
    seen = reader_of(make_replay(tmp_path / "replay")).first_observation()

    def kept(**knobs: Any) -> int:
        return memory.dry_pass(policy, seen, TRQAMConfig(**knobs)).activations

    tuned_alone, with_base = kept(adjoint="scalar"), kept()
    steps = policy.num_flow_steps
    assert kept(scheme="shifted_euler") == pytest.approx(tuned_alone, rel=0.02)
    # The base's graphs of all steps but the first wait for the adjoint; they are smaller.
    assert 0.2 < (with_base / tuned_alone - 1) * steps / (steps - 1) < 1.0
    assert kept(keep_activations=False) == pytest.approx(with_base / steps, rel=1e-3)
    one = tuned_alone / steps
    cloning = kept(adjoint="scalar", clone_interventions=0.5)
    assert cloning == pytest.approx(tuned_alone + one, rel=0.05)
    in_parts = kept(adjoint="scalar", clone_interventions=0.5, keep_activations=False)
    assert in_parts == pytest.approx(2 * one, rel=0.05)


@pytest.mark.slow
def test_an_average_is_counted_where_it_acts_and_in_checkpoints(
    policy: Any, tmp_path: Path
) -> None:
    replay = make_replay(tmp_path / "replay")
    dry = memory.DryPass(prefix=8, activations=8, reached=1, finite=True)
    plan = plan_of(replay, tmp_path / "not" / "yet", next_actions=1)
    trained = sum(p.numel() for p in policy.trainable_parameters()) * 4
    without, with_it = (
        memory.measure_memory(policy, None, dry, averages=averages) for averages in (False, True)
    )
    assert with_it.fixed - without.fixed == 2 * trained
    assert "average" in memory.check_memory(with_it, 10**12, memory.Share(1), "cpu").found
    assert "average" not in memory.check_memory(without, 10**12, memory.Share(1), "cpu").found
    one, two = (
        disk.measure_disk(policy, plan, None, needs, frame_bytes=1, num_checkpoints=1)
        for needs in (without, with_it)
    )
    assert two.checkpoints - one.checkpoints == trained


def test_of_moments_in_parts_a_process_has_one_and_a_checkpoint_all(
    policy: Any, tmp_path: Path
) -> None:
    replay = make_replay(tmp_path / "replay")
    dry = memory.DryPass(prefix=8, activations=8, reached=1, finite=True)
    plan = plan_of(replay, tmp_path / "not" / "yet", next_actions=1)
    whole, parts = (memory.measure_memory(policy, None, dry, shards=n) for n in (1, 4))
    trained = sum(p.numel() for p in policy.trainable_parameters()) * 4
    assert whole.fixed == 3 * trained
    assert parts.fixed == 1.5 * trained
    one, other = (
        disk.measure_disk(policy, plan, None, needs, frame_bytes=1, num_checkpoints=1)
        for needs in (whole, parts)
    )
    assert one.checkpoints == other.checkpoints


def test_free_memory_is_what_the_system_and_a_containers_limit_leave(tmp_path: Path) -> None:
    available = memory.available_memory(torch.device("cpu"))
    assert available is None or 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 50\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_room(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._cgroup_room(tmp_path) == 1000 - 700 + 250
    assert memory._cgroup_room(tmp_path / "none") is None


def test_next_actions_lie_in_memory_and_are_told() -> None:
    needs = replace(NEEDS, next_actions=700)
    assert needs.of(memory.Share(1)) == NEEDS.of(memory.Share(1)) + 700
    failure = memory.check_memory(needs, 1000, memory.Share(1), "cpu")
    assert not failure.ok
    assert "next actions 700 B" in failure.found
    assert failure.remedy == "fewer --critic.next_actions, or fewer --dataset.episodes"
    assert memory.check_memory(needs, 1060, memory.Share(1), "cpu").ok


@pytest.mark.slow
def test_disk_counts_checkpoints_the_replay_and_next_actions(policy: Any, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "replay")
    dry = memory.dry_pass(policy, reader_of(replay).first_observation(), TRQAMConfig())
    plan = plan_of(replay, tmp_path / "not" / "yet", next_actions=3)
    chunks = 3 * plan.frames * EXECUTED * ACTION * 4
    assert plan.next_action_bytes(policy) == chunks
    needs = memory.measure_memory(policy, None, dry, chunks)

    def needed(
        count: int, processes: int = 1, plan: disk.ReplayPlan = plan, merged: bool = False
    ) -> disk.Disk:
        return disk.measure_disk(
            policy,
            plan,
            None,
            needs,
            frame_bytes=dry.prefix,
            num_checkpoints=count,
            merged=merged,
            processes=processes,
        )

    trained = sum(p.numel() for p in policy.trainable_parameters()) * 4
    # As the host loads it, in training, and Adam's moments.
    assert needed(3).checkpoints - needed(2).checkpoints == trained * 4 + chunks
    assert needed(1, 2).checkpoints - needed(1).checkpoints == chunks
    whole = memory.module_bytes(policy.model)
    assert needed(0).checkpoints == whole
    policy.source = None  # adapters were merged into it: the run's folder gets the base
    assert needed(0).checkpoints == whole * (2 if policy.has_adapters else 1)
    assert needed(0, merged=True).checkpoints == whole  # it is in every checkpoint
    policy.source = "somewhere"
    each = needed(3, merged=True).checkpoints - needed(2, merged=True).checkpoints
    assert each == whole + trained * 3 + chunks
    assert needed(0, 3).replay == 3 * needed(0).replay
    frame = 32 * 32 * 3 + dry.prefix
    assert needed(0).replay == plan.frames * frame + plan.steps * 4 * (STATE + ACTION + 1)
    # Frames that stay in their dataset take the room of what is kept of them alone.
    lent = needed(0, plan=replace(plan, lent=plan.frames - 1))
    assert needed(0).replay - lent.replay == (plan.frames - 1) * 32 * 32 * 3
    # A run that is gone on with has written a part of it.
    there = replace(plan, path=replay.path)
    assert 0 < there.there < 10**6
    assert needed(0, plan=there).replay == needed(0).replay - there.there


def test_weights_that_are_trained_in_half_precision_are_told() -> None:
    policy = make_policy(lora=False)
    assert "float" not in memory.check_parameters(policy).found
    next(iter(policy.trainable_parameters())).data = torch.zeros(2, dtype=torch.bfloat16)
    assert "trained as they are, in bfloat16, in which" in memory.check_parameters(policy).found

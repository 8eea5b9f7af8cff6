"""Simulator processes that hang and die, of a tiny task: see accident_worker.py."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_trqam.envs import pool_worker
from vla_trqam.envs.pool_worker import Deadlines
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow
SEEDS = [30, 10, 20, 40, 5]
HORIZON, ACTION = 5, 2
DEADLINE = 2.0
FAMILY = robomimic_family(env_meta_for("Lift"), max_episode_steps=15)


def policy(observations, seeds, indices):
    noise = np.random.default_rng([seeds[0], indices[0]]).normal(size=(1, HORIZON, ACTION))
    return noise + observations[:, :1, None]


def make_pool(num_workers):
    return RolloutPool(FAMILY, chunk_length=HORIZON, num_workers=num_workers)


@pytest.fixture
def accidents(tmp_path, monkeypatch):
    """Orders accidents, and starts pools whose processes have them."""
    plan = tmp_path / "accidents.json"
    script = Path(__file__).with_name("accident_worker.py")
    monkeypatch.setenv("ACCIDENTS", str(plan))
    monkeypatch.setattr(pool_worker, "COMMAND", (sys.executable, str(script)))

    def order(*wanted, num_workers=2, start=60.0):
        plan.write_text(json.dumps(wanted))
        limits = Deadlines(DEADLINE, start=start)
        monkeypatch.setattr("vla_trqam.envs.rollout.Deadlines", lambda chunk: limits)
        return make_pool(num_workers)

    return order


KNOWN = []


@pytest.fixture
def undisturbed(accidents):
    if not KNOWN:
        with accidents() as pool:
            KNOWN.extend(pool.run(policy, SEEDS))
    return KNOWN


def assert_same(found, expected):
    assert [e.seed for e in found] == [e.seed for e in expected] == SEEDS
    for got, wanted in zip(found, expected, strict=True):
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
        assert (got.terminated, got.truncated) == (wanted.terminated, wanted.truncated)


ACCIDENTS = {
    "it hangs": ({"at": 1, "seed": 10, "kind": "sleep"}, "did not answer for 2 s at chunk 1"),
    "it is killed": ({"at": 2, "seed": 10, "kind": "kill"}, "was killed by SIGKILL at chunk 2"),
    "it is stopped": ({"at": 0, "seed": 10, "kind": "stop"}, "did not answer for 2 s at chunk 0"),
    "it ends by itself": ({"at": 1, "seed": 10, "kind": "exit"}, "ended with exit code 7"),
    "it is stopped within a reply": (
        {"at": 1, "seed": 10, "kind": "stop within a reply"},
        "did not answer for 2 s at chunk 1",
    ),
    "its reset hangs": (
        {"at": "reset", "seed": 10, "kind": "sleep"},
        "did not answer for 2 s at the reset of",
    ),
}


@pytest.mark.parametrize(("accident", "said"), ACCIDENTS.values(), ids=ACCIDENTS)
def test_a_lost_process_is_replaced_and_the_episodes_are_the_same_to_the_bit(
    accident, said, accidents, undisturbed, capfd
):
    with accidents(accident | {"times": 1}) as pool:
        assert_same(pool.run(policy, SEEDS), undisturbed)
        assert_same(pool.run(policy, SEEDS), undisturbed)  # the pool goes on working
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("of the episode of seed 10: it is replaced (1 of at most 3 times)")


def test_a_pool_whose_processes_are_all_lost_at_once_goes_on(accidents, undisturbed, capfd):
    with accidents({"at": 1, "kind": "stop", "times": 2}) as pool:
        assert_same(pool.run(policy, SEEDS), undisturbed)
    assert capfd.readouterr().err.count("it is replaced (1 of") == 2


def test_episodes_are_still_delivered_in_order_and_once(accidents):
    delivered = []
    with accidents({"at": 2, "seed": 30, "kind": "kill", "times": 1}) as pool:
        pool.run(policy, SEEDS, on_episode=delivered.append)
    assert [episode.seed for episode in delivered] == SEEDS


def test_a_process_lost_while_it_starts_is_replaced(accidents, undisturbed, capfd):
    with accidents({"at": "make", "kind": "kill", "times": 1}) as pool:
        assert (pool.observation_size, pool.action_size) == (3, 2)
        assert_same(pool.run(policy, SEEDS), undisturbed)
    assert "was killed by SIGKILL at " in capfd.readouterr().err


def test_processes_that_never_start_are_given_up(accidents):
    with (
        accidents({"at": "make", "kind": "exit", "times": 99}, num_workers=1) as pool,
        pytest.raises(UserError, match=r"code 7 at its start for the episode of seed 30, and so"),
    ):
        pool.run(policy, SEEDS)
    with (
        accidents({"at": "make", "kind": "exit", "times": 99}, num_workers=1) as pool,
        pytest.raises(UserError, match=r"ended with exit code 7 at its start, and so did the 3"),
    ):
        _ = pool.action_size


def test_a_process_that_hangs_while_it_starts_is_replaced(accidents, undisturbed, capfd):
    pool = accidents({"at": "make", "kind": "sleep", "times": 1}, num_workers=1, start=12.0)
    with pool:
        assert_same(pool.run(policy, SEEDS), undisturbed)
    assert "did not answer for 12 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("kill", "was killed by SIGKILL at chunk 1 of the episode of seed 20"),
        ("stop", "did not answer for 2 s at chunk 1 of the episode of seed 20"),
    ],
)
def test_an_episode_that_loses_its_process_every_time_is_given_up_by_its_seed(
    kind, said, accidents, capfd
):
    pool = accidents({"at": 1, "seed": 20, "kind": kind, "times": 99})
    with pytest.raises(UserError) as error:
        pool.run(policy, SEEDS)
    assert f"a simulator process {said}, and so did the 3 that took its place" in str(error.value)
    assert ("--eval.chunk_deadline" in str(error.value)) is (kind == "stop")
    assert capfd.readouterr().err.count("of the episode of seed 20: it is replaced") == 3
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(policy, SEEDS)


def test_two_losses_of_one_episode_and_one_of_another_are_all_made_good(accidents, undisturbed):
    plan = (
        {"at": 2, "seed": 40, "kind": "kill", "times": 2},
        {"at": 0, "seed": 5, "kind": "stop", "times": 1},
    )
    with accidents(*plan) as pool:
        assert_same(pool.run(policy, SEEDS), undisturbed)


def test_recording_replaces_lost_processes_too(accidents, undisturbed):
    """Its frames are millions of bytes: more than a connection holds."""
    with accidents({"at": 2, "seed": 20, "kind": "stop", "times": 1}) as pool:
        recorded = pool.record(policy, SEEDS)
    assert_same(recorded, undisturbed)
    assert [int(e.frames[0, 0, 0, 0]) for e in recorded] == SEEDS
    assert recorded[0].frames.shape == (1, 1000, 1000, 3)


def test_a_slow_policy_is_not_the_simulators_fault(accidents, undisturbed, capfd):
    """While the trainer thinks about one episode, the others' replies wait for it."""

    def slow(observations, seeds, indices):
        if seeds[0] == 30 and indices[0] == 0:
            time.sleep(2 * DEADLINE)
        return policy(observations, seeds, indices)

    with accidents() as pool:
        assert_same(pool.run(slow, SEEDS), undisturbed)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_must_be_a_positive_number(deadline):
    with pytest.raises(UserError, match="chunk_deadline is"):
        RolloutPool(FAMILY, chunk_length=5, num_workers=1, chunk_deadline=deadline)

"""Alarms by injected lines of metrics, and by a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
from toy_task import homing_policy, roll_out

from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.union import UnionSampler
from vla_trqam.engine import finetune
from vla_trqam.engine.alarms import Alarms, q_range, reward_range
from vla_trqam.engine.processes.team import Team
from vla_trqam.methods.sac_flow import SACFlowConfig

FINE = {
    "lam": 1.0,
    "lam_min": 0.03,
    "lam_max": 300.0,
    "q_mean": -20.0,
    "clipped_action_fraction": 0.1,
    "actor_grad_norm": 0.7,
}
WRONG = {
    "lam_on_bound": ({"lam": 0.03}, 10, ["lower bound 0.03", "--method.kl_budget"]),
    "lam_on_bound, upper": ({"lam": 300.0}, 10, ["upper bound 300", "--method.lam_max"]),
    "q_out_of_range": (
        {"q_mean": 11.0},
        3,
        ["the mean Q is 11, above", "(-100 to 0)", "--critic.pessimism"],
    ),
    "q_out_of_range, below": ({"q_mean": -111.0}, 3, ["-111, below"]),
    "q_out_of_range, infinite": ({"q_mean": "Infinity"}, 3, ["the mean Q is inf, above"]),
    "actions_clipped": ({"clipped_action_fraction": 0.62}, 3, ["62% of the policy's actions"]),
    "dead_gradient": ({"actor_grad_norm": 0.0}, 3, ["norm of the policy's gradient is 0"]),
    "dead_gradient, nearly": ({"actor_grad_norm": 1e-9}, 3, ["1e-09"]),
}


def alarms():
    return Alarms(q_range((-1.0, 0.0), 0.99))


@pytest.mark.parametrize("name", WRONG)
def test_an_alarm_is_told_once_when_it_begins_and_logged_until_it_ends(name):
    change, patience, told = WRONG[name]
    watch, bad, name = alarms(), FINE | change, name.partition(",")[0]
    for _ in range(2):  # it comes back
        for _ in range(patience - 1):
            looked = watch.look(bad)
            assert (looked.numbers, looked.sentences) == ({}, [])
        looked = watch.look(bad)
        assert looked.numbers == {f"alarm_{name}": 1}
        (sentence,) = looked.sentences
        assert sentence.startswith(f"alarm {name}: ")
        assert "\n" not in sentence
        assert [text for text in told if text not in sentence] == []
        again = watch.look(bad)
        assert (again.numbers, again.sentences) == ({f"alarm_{name}": 1}, [])
        over = watch.look(FINE)
        assert (over.numbers, over.sentences) == ({f"alarm_{name}": 0}, [])
        assert watch.look(FINE).numbers == {}


@pytest.mark.parametrize("name", WRONG)
def test_one_good_line_in_between_begins_the_count_anew(name):
    change, patience, _ = WRONG[name]
    watch = alarms()
    for _ in range(3):
        for _ in range(patience - 1):
            assert watch.look(FINE | change).sentences == []
        assert watch.look(FINE).sentences == []


@pytest.mark.parametrize(
    "change",
    [
        {"q_mean": 9.9},  # within the slack of a tenth
        {"q_mean": -109.9},
        {"q_mean": "NaN"},
        {"clipped_action_fraction": 0.5},
        {"actor_grad_norm": 2e-8},
        {"actor_grad_norm": 0.0, "lam": math.inf},
        {"lam": 0.0301},
    ],
)
def test_what_is_within_its_limits_sets_off_nothing(change):
    watch = alarms()
    assert [watch.look(FINE | change).sentences for _ in range(20)] == [[]] * 20


def test_lines_that_do_not_tell_are_passed_over():
    watch = alarms()
    for _ in range(2):
        watch.look(FINE | {"q_mean": 50.0})
        watch.look({"success": 1.0, "episode_steps": 5})
        watch.look({"td_loss": 0.1})
    assert watch.look({"q_mean": 50.0}).numbers == {"alarm_q_out_of_range": 1}


def test_without_a_dual_lambda_has_no_bounds_and_without_rewards_q_none():
    watch = Alarms(None)
    line = FINE | {"lam": 0.03, "q_mean": 1e9}
    del line["lam_min"], line["lam_max"]
    assert [watch.look(line).sentences for _ in range(12)] == [[]] * 12


def test_shown_the_lines_again_alarms_are_where_they_were():
    lines = [FINE | {"q_mean": 50.0}] * 2 + [{"success": 1.0}] + [FINE | {"q_mean": 50.0}] * 3
    watch, other = alarms(), alarms()
    for line in lines:
        watch.look(line)
    other.look(FINE | {"lam": 0.03})
    other.restart(lines)
    assert other.look(FINE | {"q_mean": 50.0}) == watch.look(FINE | {"q_mean": 50.0})
    assert other.look(FINE) == watch.look(FINE)
    other.restart(lines[:2])
    assert len(other.look(FINE | {"q_mean": 50.0}).sentences) == 1


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((-1.0, 0.0), (-10.0, 0.0)),
        ((0.0, 1.0), (0.0, 10.0)),
        ((-0.5, 2.0), (-5.0, 20.0)),
        ((0.5, 2.0), (0.5, 20.0)),  # an episode of one step
        ((-2.0, -0.5), (-20.0, -0.5)),
        ((0.0, 0.0), None),
    ],
)
def test_q_is_between_the_returns_of_the_least_and_the_largest_reward(rewards, expected):
    assert q_range(rewards, 0.9) == (None if expected is None else pytest.approx(expected))


def test_no_return_of_any_length_lies_outside():
    rng = np.random.default_rng(0)
    for low, high in ((-1.0, 0.0), (0.2, 1.0), (-3.0, -1.0), (-1.0, 2.0)):
        limits = q_range((low, high), 0.8)
        for length in (1, 2, 5, 200):
            for rewards in (rng.uniform(low, high, length), np.full(length, low)):
                total = float(np.sum(rewards * 0.8 ** np.arange(length)))
                assert limits[0] - 1e-9 <= total <= limits[1] + 1e-9


@pytest.mark.parametrize(
    ("kind", "rolls_out", "expected"),
    [
        ("success_minus_one", True, (-1.0, 0.0)),
        ("sparse", True, (0.0, 1.0)),
        ("column", False, (0.25, 3.0)),
        ("column", True, (0.0, 3.0)),
    ],
)
def test_rewards_are_those_of_the_kind_or_of_the_data(kind, rolls_out, expected, tmp_path):
    buffer = Replay.create(tmp_path / "replay", observation_dim=3, action_dim=2, capacity=1000)
    for source, scale in (("dataset", 3.0), ("online", 99.0)):
        episode = roll_out(homing_policy(2, 0.2), 3, 12)
        rewards = np.linspace(0.25 if source == "dataset" else 0.0, scale, episode.num_steps)
        if kind != "column":
            rewards = episode.rewards
        buffer.add(replace(episode, rewards=rewards), source=source)
    sampler = buffer.sampler(
        chunk_length=2, discount=0.9, short_chunks="pad", reward=RewardSpec(kind)
    )
    assert reward_range(sampler, rolls_out=rolls_out) == expected
    buffer.close()


def test_a_q_that_holds_more_than_rewards_has_no_bounds_from_them():
    """SAC Flow's has an entropy in it: it is far below all returns and does not diverge."""
    config = FinetuneRobomimicConfig(method=SACFlowConfig())
    assert finetune._q_range(config, None, Team()) is None


def test_dense_rewards_lie_between_the_worst_of_all_data_and_0(tmp_path):
    samplers = []
    for worst in (-3.0, -7.0):
        buffer = Replay.create(
            tmp_path / f"replay{worst}", observation_dim=3, action_dim=2, capacity=1000
        )
        episode = roll_out(homing_policy(2, 0.2), 3, 12)
        missing = worst + np.arange(episode.num_steps, dtype=np.float32) % 4
        buffer.add(replace(episode, rewards=missing), source="dataset")
        # What was rolled out is there from the beginning in a run that is gone on with alone.
        buffer.add(replace(episode, rewards=missing - 9), source="online")
        samplers.append(
            buffer.sampler(
                chunk_length=2, discount=0.9, short_chunks="pad", reward=RewardSpec("dense")
            )
        )
        assert reward_range(samplers[-1], rolls_out=True) == (worst, 0.0)
    for parts in (samplers, samplers[::-1]):
        assert reward_range(UnionSampler(parts), rolls_out=True) == (-7.0, 0.0)
    for sampler in samplers:
        sampler.buffer.close()

"""Run and Phase themselves, without a recipe."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from toy_files import metrics_lines
from toy_learners import make_cloning, make_off_policy
from toy_run import chunks, filled_replay, make_run, phase
from toy_task import ToyPool, homing_policy, roll_out

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.engine.processes.interruption import InterruptGuard
from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import DivergenceError, UserError
from vla_trqam.report.critic_check import check_critic
from vla_trqam.report.metrics import MetricsLog

SEEDS = (900, 901, 902)


@pytest.fixture
def replay(tmp_path):
    with filled_replay(tmp_path / "replay") as buffer:
        yield buffer


@pytest.fixture
def learner():
    return make_off_policy()


@pytest.fixture
def run(tmp_path, replay, learner):
    ToyPool.rounds, ToyPool.before_run = [], None
    with MetricsLog(tmp_path / METRICS_NAME) as metrics:
        yield make_run(tmp_path, replay, learner, metrics, evaluation_seeds=SEEDS)


def test_rollouts_join_the_replay_before_the_update_that_asks_for_them(run, learner):
    held = []
    update = learner.update
    learner.update = lambda *a: (held.append(run.store.num_episodes), update(*a))
    seeds = {0: [5, 6], 3: [7]}
    run.train(
        [phase(run, learner, "online", episodes_before=lambda n: seeds.get(n, []))],
        InterruptGuard(),
    )
    assert held == [7, 7, 7, 8]
    assert set(run.store.replay.episodes().source[5:]) == {"online"}
    stored = run.store.replay.episodes()
    row = stored.first_observation[5]
    assert np.array_equal(run.store.replay.observations[row][:2], roll_out_start(5))


def test_the_running_mean_acts_is_evaluated_and_saved(tmp_path, replay, monkeypatch):
    learner, seen = make_off_policy(average_rate=0.1), []
    policy, average = learner.policy, learner.average

    def is_the_average():
        pairs = zip(policy.trainable_parameters(), average.weights, strict=True)
        return all(torch.equal(ours, mean) for ours, mean in pairs)

    def acts_with_the_average(_):
        seen.append(is_the_average())

    with MetricsLog(tmp_path / METRICS_NAME) as metrics:
        run = make_run(tmp_path, replay, learner, metrics, evaluation_seeds=SEEDS)
        ToyPool.before_run = staticmethod(acts_with_the_average)
        add, kept_by = type(run.store).add, []
        monkeypatch.setattr(
            type(run.store), "add", lambda *a, **k: (kept_by.append(is_the_average()), add(*a, **k))
        )
        try:
            rolled_out = {2: [5]}
            run.train(
                [
                    phase(
                        run,
                        learner,
                        "online",
                        episodes_before=lambda n: rolled_out.get(n, []),
                        evaluate_every=2,
                    )
                ],
                InterruptGuard(),
            )
        finally:
            ToyPool.before_run = None
    assert kept_by == [False]  # next actions that are drawn then are of the weights in training
    assert seen == [True] * 4  # evaluations after 0, 2 and 4 updates, rollouts before the third
    saved = type(policy).from_pretrained(tmp_path / "checkpoints/last/pretrained_model")
    mean = list(average.weights)
    assert all(torch.equal(a, b) for a, b in zip(saved.tuned.parameters(), mean, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy.tuned.parameters(), mean, strict=True))


def roll_out_start(seed):
    return roll_out(homing_policy(2, 0.0), seed, 1).observations[0][:2]


@pytest.mark.parametrize(
    "acts", [{"evaluate_every": 3}, {"episodes_before": lambda n: [5] if n == 3 else []}]
)
def test_weights_that_an_update_broke_do_not_act(run, learner, acts):
    """Its losses were finite; the next update's are not."""
    update, count = learner.update, []

    def break_in_the_third(*given):
        update(*given)
        count.append(1)
        if len(count) == 3:
            with torch.no_grad():
                next(iter(learner.policy.trainable_parameters())).fill_(torch.inf)

    learner.update = break_in_the_third
    with pytest.raises(DivergenceError, match="is not finite after online update 3"):
        run.train([phase(run, learner, "online", **acts)], InterruptGuard())
    assert ToyPool.rounds == ([list(SEEDS)] if "evaluate_every" in acts else [])


@pytest.mark.parametrize(("every", "expected"), [(0, []), (2, [0, 2, 4]), (3, [0, 3])])
def test_evaluations_come_at_0_and_every_so_many_updates(every, expected, run, learner):
    run.train([phase(run, learner, evaluate_every=every)], InterruptGuard())
    lines = metrics_lines(run.output_dir)
    assert [line["step"] for line in lines if line["phase"] == "eval"] == expected
    assert ToyPool.rounds == [list(SEEDS)] * len(expected)


def test_pretraining_is_not_counted_as_off_policy_updates(run, learner):
    cloning = make_cloning(num_steps=4)
    phases = [
        phase(run, cloning, "pretrain", moves_policy=False),
        phase(run, learner, "online", evaluate_every=4),
    ]
    run.train(phases, InterruptGuard())
    assert run.step == 4
    names = [path.name for path in (run.output_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["000004", "last", "pretrain_000004"]
    assert [line["step"] for line in metrics_lines(run.output_dir)] == [2, 4, 0, 2, 4, 4]


def test_a_checkpoint_of_an_unknown_phase_is_refused(run, learner):
    run.train([phase(run, learner)], InterruptGuard())
    path = run.output_dir / "checkpoints/last/training_state/position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"phase": "dreaming"}))
    with pytest.raises(UserError, match="'dreaming'; this run has offline only"):
        run.train([phase(run, learner)], InterruptGuard())


def test_the_clock_runs_separately_for_updates_rollouts_and_evaluations(run, learner):
    run.train(
        [phase(run, learner, evaluate_every=2, episodes_before=lambda n: [] if n else [5])],
        InterruptGuard(),
    )
    assert run.wall_clock.keys() == {"offline", "rollouts", "evaluations"}
    assert all(seconds > 0 for seconds in run.wall_clock.values())


def test_a_log_file_gets_lines_without_control_characters(run, learner, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run.train([phase(run, learner, evaluate_every=2)], InterruptGuard())
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    (line,) = text.splitlines()
    assert line.startswith("offline: 4/4 (100%), ")
    assert "success" in line
    assert "KL" in line


def test_the_critic_check_is_q_beside_the_return_of_whole_chunks(replay):
    torch.manual_seed(0)
    method = make_off_policy()
    policy = method.policy
    check = check_critic(policy, method.score, chunks(replay))
    table = replay.episodes()
    assert len(check.q) == (table.num_steps - 1).clip(0).sum()
    expected = []
    for episode in range(len(table)):
        length, start = table.num_steps[episode], table.first_step[episode]
        for step in range(length - 1):
            tail = replay.rewards[start + step : start + length] - 1
            total = float(sum(0.9**i * r for i, r in enumerate(tail)))
            expected.append(total if table.terminated[episode] else np.nan)
    assert np.allclose(np.sort(check.returns), np.sort(expected), equal_nan=True)
    assert np.array_equal(check.known, np.isfinite(check.returns))


def test_without_a_whole_chunk_the_critic_check_is_empty(tmp_path):
    short = Replay.create(tmp_path / "short", observation_dim=3, action_dim=2, capacity=9)
    episode = Episode(np.zeros((2, 3)), np.zeros((1, 2)), np.ones(1), True, False, True)
    short.add(episode, source="dataset")
    method = make_off_policy()
    check = check_critic(method.policy, method.score, chunks(short))
    assert len(check.q) == 0
    assert not check.known.any()

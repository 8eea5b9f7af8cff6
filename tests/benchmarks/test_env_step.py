import re

import env_step
import numpy as np
import pytest


class Toy:
    """Adds up its actions; a wrong one errs in the last number of one step of one episode."""

    def __init__(self, wrong_at: tuple[int, int] | None = None) -> None:
        self.wrong_at, self.seed, self.count = wrong_at, 0, 0
        self.state = np.zeros(7, np.float32)
        self.played: list[tuple[int, int]] = []

    def reset(self, seed):
        self.seed, self.count, self.state = seed, 0, np.full(7, seed, np.float32)
        return self._observe()

    def step(self, action):
        self.count += 1
        self.state = (self.state + action).astype(np.float32)
        return self._observe()

    def close(self):
        pass

    def _observe(self):
        self.played.append((self.seed, self.count))
        wrong = np.zeros(7, np.float32)
        wrong[-1] = self.wrong_at == (self.seed, self.count)
        return self.state + wrong


def test_both_play_the_same_steps_and_all_count_but_the_first():
    ours, stock = Toy(), Toy()
    fast, slow, difference = env_step.compare(ours, stock, 230)
    assert difference is None
    assert ours.played == stock.played
    assert (
        (fast.steps, len(fast.reset_seconds)) == (slow.steps, len(slow.reset_seconds)) == (230, 3)
    )
    assert ours.played[3:] == [(s, k) for s, n in enumerate([100, 100, 30]) for k in range(n + 1)]


@pytest.mark.parametrize("wrong_at", [(0, 50), (1, 0), (2, 30)])
def test_one_other_number_in_one_step_is_found(wrong_at):
    _, _, difference = env_step.compare(Toy(wrong_at), Toy(), 230)
    assert difference == "differ by 1.0e+00 at seed {}, step {}".format(*wrong_at)


def test_actions_are_smooth_and_within_the_box():
    actions = env_step.smooth_actions(2000, 3)
    assert actions.shape == (2000, 7)
    assert np.abs(actions).max() == 1.0
    assert set(actions[:, -1]) == {-1.0, 1.0}
    arm = actions[:, :-1]
    assert arm.std() > 0.4
    assert np.diff(arm, axis=0).std() < 0.7 * arm.std()
    np.testing.assert_array_equal(actions, env_step.smooth_actions(2000, 3))


@pytest.mark.slow
def test_the_fast_step_is_robosuites_own_on_the_simulator(capsys):
    assert env_step.main(["--tasks", "lift", "--steps", "8"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"lift +(\d+) +(\d+) +[\d.]+ +([\d.]+) +([\d.]+)  identical", line)
    assert found is not None, line
    assert all(float(value) > 0 for value in found.groups())


def test_a_difference_ends_with_one(monkeypatch, capsys):
    monkeypatch.setattr(env_step, "Ours", lambda task: Toy((0, 2)))
    monkeypatch.setattr(env_step, "Stock", lambda task: Toy())
    assert env_step.main(["--tasks", "lift", "can", "--steps", "5"]) == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert all(line.endswith("differ by 1.0e+00 at seed 0, step 2") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--steps", "0"], "--steps 0"), (["--tasks", "lift", "lfit"], "'lfit'")],
)
def test_bad_input_is_refused_in_a_sentence(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(env_step, "Ours", None)
    assert env_step.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err

"""The swing of success between rounds: against chance, and against what is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import round_swing
from round_swing import Rounds, interval, swing

EPISODES = 20


def run(folder: Path, rounds: list[list[int]]) -> Path:
    folder.mkdir()
    lines = [
        {"step": 100 * number, "phase": "online", "time": 1.0, "success": success}
        for number, successes in enumerate(rounds)
        for success in successes
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def of_rates(rates: np.ndarray, rng: np.random.Generator) -> Rounds:
    successes = rng.binomial(EPISODES, rates)
    return Rounds("run", successes / EPISODES, np.full(len(rates), EPISODES))


def test_one_policy_swings_as_chance_does() -> None:
    rng = np.random.default_rng(0)
    runs = [of_rates(np.full(10, p), rng) for p in (0.1, 0.5, 0.9) for _ in range(400)]
    assert swing(runs) == pytest.approx(1.0, abs=0.02)
    low, high = interval(runs, 500) or (0.0, 0.0)
    assert low < 1.0 < high


def test_a_policy_that_goes_up_and_down_swings_by_what_it_moves() -> None:
    rng = np.random.default_rng(0)
    p, q = 0.4, 0.8
    runs = [of_rates(np.array([p, q] * 5), rng) for _ in range(2000)]
    moved = (p - q) ** 2 / 2 + (p * (1 - p) + q * (1 - q)) / (2 * EPISODES)
    # Both together are of one rate between, with what the two differ.
    both, count = (p + q) / 2, 2 * EPISODES
    of_mean = (p * (1 - p) + q * (1 - q)) / (4 * EPISODES)
    chance = (both * (1 - both) - of_mean) * count / (count - 1) / EPISODES
    assert swing(runs) == pytest.approx(np.sqrt(moved / chance), rel=0.02)
    assert swing(runs) > 2.0


def test_rounds_of_a_log_by_their_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = run(tmp_path / "one", [[1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1]])
    rounds = Rounds.of(folder)
    assert rounds.rates.tolist() == [0.25, 0.375, 1.0]
    assert rounds.episodes.tolist() == [4, 8, 4]
    assert rounds.seen == pytest.approx((0.125**2 + 0.625**2) / 2)
    # (1 + 3) of 12, and (3 + 4) of 12: variances without bias, of the two rounds' numbers.
    first, second = (k / 12 * (1 - k / 12) * 12 / 11 * (1 / 4 + 1 / 8) / 2 for k in (4, 7))
    assert rounds.by_chance == pytest.approx(first + second)
    assert round_swing.main(["--runs", str(folder)]) == 0
    said = capsys.readouterr().out
    recorded = tmp_path / "one.json"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    success = {"step": [r["step"] for r in rows], "value": [r["success"] for r in rows]}
    recorded.write_text(json.dumps({"metrics": {"online": {"success": success}}}))
    same = Rounds.of(recorded)
    assert (same.run, same.rates.tolist(), same.episodes.tolist()) == (
        "one",
        [0.25, 0.375, 1.0],
        [4, 8, 4],
    )
    assert f"| one | 25.0%, 37.5%, 100.0% | {swing([rounds]):.2f} |" in said


def test_a_run_without_rounds_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = run(tmp_path / "one", [[1, 0]])
    assert round_swing.main(["--runs", str(folder)]) == 2
    assert "no two rounds" in capsys.readouterr().err

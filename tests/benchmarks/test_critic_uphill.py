"""The uphill check finds the slope of a world that is known, whichever way the critic points."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from critic_uphill import examine, load_subject, main
from safetensors.torch import save_file
from uphill.probe import (
    ARMS,
    Continuation,
    Decision,
    PairedDifference,
    executed_move,
    follow,
    meet_decision,
    moves,
)
from uphill.report import describe, draw, q_against_returns, to_json, verdict
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.config.parsing import dump_config
from vla_trqam.config.settings import CriticConfig
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.envs.chunked import ChunkEnv

CHUNK, ACTIONS = 2, 3
GOAL = 7.0


class Track(gymnasium.Env[np.ndarray, np.ndarray]):
    """A runner: the first number of an action is its speed beyond 1; success at the goal."""

    def __init__(self, *, forgetful: bool = False) -> None:
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self._forgetful = forgetful
        self._resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        assert seed is not None
        self._resets += self._forgetful
        self.x = (seed % 10) / 10 + self._resets
        return self._see(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.x += 1.0 + float(action[0])
        done = self.x >= GOAL
        return self._see(), float(done), done, False, {"is_success": done}

    def _see(self) -> np.ndarray:
        return np.array([self.x], np.float32)


def steady(observations: np.ndarray, seeds: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    return np.zeros((len(observations), CHUNK, ACTIONS), np.float32)


def points_at(sign: float) -> Any:
    def gradient_of(observations: np.ndarray, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gradient = np.zeros_like(chunks)
        gradient[..., 0] = sign * 3.0
        return gradient, sign * 3.0 * chunks[..., 0].sum(axis=1)

    return gradient_of


def after(horizon: int = 30) -> Continuation:
    return Continuation(steady, horizon, 0.9, RewardSpec("success_minus_one"))


def decisions(count: int = 20) -> tuple[ChunkEnv, list[Decision]]:
    env, rng = ChunkEnv(Track(), CHUNK), np.random.default_rng(0)
    return env, [meet_decision(env, steady, seed, 30, rng) for seed in range(count)]


def test_returns_are_those_of_counted_steps() -> None:
    env = ChunkEnv(Track(), CHUNK)
    start = Decision(
        seed=0,
        number=1,
        before=np.zeros((1, CHUNK, ACTIONS), np.float32),
        observation=np.array([2.0], np.float32),
        chunk=np.zeros((CHUNK, ACTIONS), np.float32),
    )
    slow, fast = follow(env, start, start.chunk, after()), start.chunk.copy()
    fast[:, 0] = 1.0
    # From 2: five steps of 1, or two of 2 and one of 1. The step that succeeds costs nothing.
    assert slow.steps == 5
    assert slow.discounted_return == pytest.approx(-(1 + 0.9 + 0.81 + 0.729))
    quick = follow(env, start, fast, after())
    assert (quick.steps, quick.success) == (3, True)
    assert quick.discounted_return == pytest.approx(-(1 + 0.9))
    cut = follow(env, start, start.chunk, after(horizon=3))
    assert (cut.steps, cut.success) == (3, False)
    assert cut.discounted_return == pytest.approx(-(1 + 0.9 + 0.81))


@pytest.mark.parametrize(("sign", "words"), [(1.0, "is uphill"), (-1.0, "**downhill**")])
def test_the_verdict_follows_the_world_and_not_the_critic(sign: float, words: str) -> None:
    env, met = decisions()
    (result,) = examine(env, met, points_at(sign), [0.5], after())
    assert words in verdict(result)
    # Q promises a gain either way.
    assert result.predicted("up", "base") > 0
    assert np.sign(result.return_difference("up", "down").mean) == sign


def test_a_critic_without_a_slope_moves_nothing_and_shows_nothing() -> None:
    env, met = decisions(5)
    flat = lambda observations, chunks: (np.zeros_like(chunks), np.zeros(len(chunks)))  # noqa: E731
    (result,) = examine(env, met, flat, [0.5], after())
    assert result.executed == dict.fromkeys(ARMS, 0.0)
    assert result.return_difference("up", "base").mean == 0.0
    assert "neither" in verdict(result)


def test_moves_have_unit_size_and_stay_where_the_gradient_is() -> None:
    gradient = np.random.default_rng(1).standard_normal((CHUNK, ACTIONS))
    gradient[:, 2] = 0.0
    directions = moves(gradient, np.random.default_rng(2))
    for direction in directions.values():
        assert np.sqrt(np.mean(direction**2)) == pytest.approx(1.0)
        assert not direction[:, 2].any()
    cosine = (directions["up"] * gradient).sum() / np.linalg.norm(directions["up"])
    assert cosine == pytest.approx(np.linalg.norm(gradient))
    np.testing.assert_array_equal(directions["down"], -directions["up"])


def test_the_executed_move_counts_the_clip() -> None:
    chunk = np.array([[[0.9, 0.0]]])
    assert executed_move(chunk + 0.5, chunk) == pytest.approx(np.sqrt((0.1**2 + 0.5**2) / 2))


def test_a_simulator_that_does_not_repeat_is_noticed() -> None:
    env = ChunkEnv(Track(forgetful=True), CHUNK)
    decision = meet_decision(env, steady, 0, 30, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="did not repeat itself: seed 0"):
        follow(env, decision, decision.chunk, after())


def test_the_interval_is_the_normal_one_for_many_decisions() -> None:
    values = np.random.default_rng(3).normal(2.0, 5.0, 400)
    interval = PairedDifference.of(values).interval
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_table_figure_and_numbers_are_written(tmp_path: Path) -> None:
    env, met = decisions(6)
    results = examine(env, met, points_at(1.0), [0.25, 0.5], after())
    text = describe(results, "tuned")
    assert "| 0.25 | up - down |" in text
    assert (
        "6 states of the base policy; after its chunk the tuned policy succeeds in 100.0%" in text
    )
    assert draw(results, tmp_path / "a.png", "Uphill?").stat().st_size > 10_000
    raw = json.loads(json.dumps(to_json(met, results, {"run": "a"})))
    assert [state["seed"] for state in raw["states"]] == list(range(6))
    first = raw["steps"][1]["outcomes"]["up"][0]
    assert first["discounted_return"] == results[1].returns("up")[0]


def test_q_against_returns_of_a_perfect_critic() -> None:
    env, met = decisions(10)
    (result,) = examine(env, met, points_at(1.0), [0.5], after())
    result.q["base"] = result.returns("base") + 2.0
    fit = q_against_returns(result)
    assert fit["correlation"] == pytest.approx(1.0)
    assert fit["rank_correlation"] == pytest.approx(1.0)
    assert fit["bias"] == pytest.approx(2.0)


def make_run(folder: Path) -> Critic:
    torch.manual_seed(0)
    shape = MLPFlowConfig(
        observation_dim=4, action_dim=3, chunk_length=2, hidden_dims=(8,), num_flow_steps=2
    )
    policy = MLPFlowPolicy(shape, torch.full((4,), 0.5), torch.full((4,), 2.0))
    critic = Critic(CriticEnsemble(4, 6, (8,), 2))
    for parameter in critic.target.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    policy.save_pretrained(folder / "base_policy")
    policy.save_pretrained(folder / "checkpoints" / "last" / "pretrained_model")
    algorithm = folder / "checkpoints" / "last" / "algorithm"
    algorithm.mkdir()
    save_file(
        {f"critic.{k}": v for k, v in critic.state_dict().items()},
        algorithm / "networks.safetensors",
    )
    settings = FinetuneRobomimicConfig(critic=CriticConfig(hidden_dims=(8,), ensemble_size=2))
    dump_config(settings, folder / "config.yaml")
    return critic


def test_the_gradient_is_the_target_ensembles_by_finite_differences(tmp_path: Path) -> None:
    critic = make_run(tmp_path)
    subject = load_subject(tmp_path)
    rng = np.random.default_rng(4)
    observation = rng.standard_normal((1, 4), dtype=np.float32)
    chunk = rng.uniform(-0.5, 0.5, (1, 2, 3))
    gradient, value = subject.gradient_of(observation, chunk)

    def q(point: np.ndarray) -> float:
        features = (torch.from_numpy(observation) - 0.5) / 2.0
        action = torch.from_numpy(point)
        with torch.no_grad():
            return float(critic.double().target(features.double(), action).mean(dim=0))

    assert value[0] == pytest.approx(q(chunk), abs=1e-5)
    for index in np.ndindex(2, 3):
        nudge = np.zeros_like(chunk)
        nudge[0][index] = 1e-4
        slope = (q(chunk + nudge) - q(chunk - nudge)) / 2e-4
        assert gradient[0][index] == pytest.approx(slope, abs=1e-4)


def test_what_cannot_be_examined_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make_run(run)
    networks = run / "checkpoints" / "last" / "algorithm" / "networks.safetensors"
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "none")], "config.yaml does not exist"),
        ([str(run), "--checkpoint", "000007"], "000007"),
        ([str(run), "--step", "0"], "must be positive"),
        ([str(run), "--states", "1"], "--states 1"),
    ]
    for arguments, wants in cases:
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert wants in message
        assert message.count("\n") == 1
    save_file({"policy.x": torch.zeros(1)}, networks)
    assert main([str(run)]) == 2
    assert "has no critic" in capsys.readouterr().err
    save_file({"critic.x": torch.zeros(1)}, networks)
    assert main([str(run)]) == 2
    assert "does not fit the run's settings" in capsys.readouterr().err
    assert not (run / "critic_uphill.json").exists()

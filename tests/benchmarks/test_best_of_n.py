"""The base's chunks, ranked by a critic whose taste is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from best_of_n import best_of_n, describe, main
from critic_uphill import Subject
from torch import Tensor, nn
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.episode import Episode

OBSERVATION, ACTION, HORIZON, STATES = 4, 2, 3, 6


class Taste(nn.Module):
    """Two members that like large executed numbers, and disagree by a constant."""

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        total = action.flatten(1).sum(dim=1)
        return torch.stack([total, total + 5.0])


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    policy = MLPFlowPolicy(MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (16,), num_flow_steps=4))
    with torch.no_grad():
        for parameter in policy.tuned.parameters():
            parameter.add_(1.0)  # must not act: the base does
    critic = Critic(CriticEnsemble(OBSERVATION, ACTION * HORIZON, (8,), 2))
    critic.target = Taste()
    return Subject(FinetuneRobomimicConfig(), policy, policy, critic)


def asked() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    observations = np.random.default_rng(0).normal(size=(STATES, OBSERVATION))
    return observations, np.arange(STATES), np.arange(STATES) % 2


def liked(chunks: np.ndarray) -> np.ndarray:
    return chunks.clip(-1, 1).reshape(len(chunks), -1).sum(axis=1)


def test_more_chunks_to_choose_from_are_never_liked_less_and_mostly_more(subject: Subject) -> None:
    values = [liked(best_of_n(subject, n)(*asked())) for n in (1, 2, 8, 32)]
    for fewer, more in pairwise(values):
        assert np.all(more >= fewer - 1e-5)
    assert np.mean(values[-1] > values[0] + 0.1) > 0.6


def test_the_choice_is_the_favourite_among_the_bases_own_chunks(subject: Subject) -> None:
    observations, seeds, numbers = asked()
    chosen = best_of_n(subject, 8)(observations, seeds, numbers)
    critic = subject.critic
    critic.target = CriticEnsemble(OBSERVATION, ACTION * HORIZON, (8,), 3)
    another = best_of_n(subject, 8)(observations, seeds, numbers)
    assert chosen.shape == another.shape == (STATES, HORIZON, ACTION)
    assert not np.allclose(chosen, another)
    again = best_of_n(subject, 8)(observations[2:3], seeds[2:3], numbers[2:3])
    assert np.allclose(again, another[2:3], atol=1e-6), "a choice does not depend on the others"


def episode(success: bool, steps: int) -> Episode:
    return Episode(
        observations=np.zeros((steps + 1, 1), np.float32),
        actions=np.zeros((steps, 1), np.float32),
        rewards=np.zeros(steps, np.float32),
        terminated=success,
        truncated=not success,
        success=success,
        seed=0,
    )


def test_the_table_pairs_every_n_with_the_base() -> None:
    base = [episode(i < 2, 10) for i in range(4)]
    better = [episode(i < 3, 6) for i in range(4)]
    lines = describe({1: base, 8: better}, range(4)).splitlines()
    assert lines[2].split("|")[1:4] == [" 1 ", " 50.0% ", "  "]
    assert lines[3].split("|")[1:4] == [" 8 ", " 75.0% ", " +25.0 "]
    assert lines[3].rstrip(" |").endswith(" 6")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n", "0"], "--n must lie between 1 and"),
        (["--states", "1"], "--states must lie between 2 and"),
        (["--num_workers", "0"], "--num_workers must lie between 1 and"),
        ([], "no_run"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    flags: list[str], sentence: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "no_run"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1

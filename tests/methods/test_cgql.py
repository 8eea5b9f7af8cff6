"""What CGQL's files do not show: what LINEX finds, and the critic's time where nobody names it."""

import pytest
import torch
from update_problems import ACTION, BATCH, HORIZON, OBSERVATION, STEPS, batch_of
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.methods.base import GeneratorNoise
from vla_trqam.methods.cgql import CGQL, CGQLConfig, CGQLLConfig, linex


def method_of(config: CGQLConfig) -> CGQL:
    torch.manual_seed(0)
    policy = MLPFlowPolicy(MLPFlowConfig(OBSERVATION, ACTION, HORIZON, (16,), num_flow_steps=STEPS))
    return CGQL(policy, Critic(CriticEnsemble(OBSERVATION, HORIZON * ACTION, (16,), 3)), config)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_linex_is_least_at_the_soft_maximum(beta: float) -> None:
    known = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = ((beta * known).exp().mean().log() / beta).requires_grad_(True)
    loss = linex(q, known, beta, clip=100.0).mean()
    (slope,) = torch.autograd.grad(loss, q)
    assert float(slope) == pytest.approx(0.0, abs=1e-9)
    for off in (-0.1, 0.1):
        assert float(linex(q.detach() + off, known, beta, clip=100.0).mean()) > loss.item()


def test_linex_beyond_its_clip_is_a_line() -> None:
    q = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = linex(q, torch.tensor([3.0, 3.0], dtype=torch.float64), 2.0, clip=5.0)
    assert loss.tolist() == pytest.approx([6.0, torch.e**4 + 2.0])
    (slope,) = torch.autograd.grad(loss.sum(), q)
    assert slope.tolist() == pytest.approx([-2.0, 2.0 * (1.0 - torch.e**4)])


def test_who_names_no_time_asks_about_clean_chunks() -> None:
    method, batch = method_of(CGQLLConfig()), batch_of(0)
    features = method.policy.encode(batch.observation)
    ensemble = method.critic.online
    one, half = torch.ones(BATCH), torch.full((BATCH,), 0.5)
    clean = ensemble(features, batch.action)
    assert torch.equal(ensemble(features, batch.action, tau=one), clean)
    assert not torch.allclose(ensemble(features, batch.action, tau=half), clean)
    assert torch.equal(method.score(features, batch.action), clean.mean(dim=0))


def test_without_guidance_it_acts_as_its_base() -> None:
    method = method_of(CGQLConfig(guidance=0.0))
    context = method.policy.encode(batch_of(0).observation)
    chunks = []
    for which in ("tuned", "base"):
        noise = GeneratorNoise(torch.Generator().manual_seed(3), BATCH, torch.device("cpu"))
        chunks.append(method.actor(which).chunk(context, noise))  # type: ignore[arg-type]
    assert torch.allclose(chunks[0], chunks[1], atol=1e-6)


def test_padded_dimensions_are_guided_by_nothing() -> None:
    method = method_of(CGQLConfig(guidance=1.0))
    mask = torch.tensor([True, False, True])

    class Padded(MLPFlowPolicy):
        @property
        def action_mask(self) -> torch.Tensor:
            return mask

    policy = Padded(method.policy.config)
    padded = CGQL(policy, Critic(CriticEnsemble(OBSERVATION, HORIZON * 2, (16,), 3)), CGQLConfig())
    x = torch.randn(BATCH, HORIZON, ACTION)
    push = padded.push(policy.encode(batch_of(0).observation), x, 0.5)
    assert not push[..., ~mask].any()
    assert push[..., mask].all()

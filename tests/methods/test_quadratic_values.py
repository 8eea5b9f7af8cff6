"""A Gaussian base and a quadratic Q that is known: where each method must arrive, in closed form.

``Q(x) = w . x - c |x|^2 / 2`` over chunks of one action of two numbers, the base N(0, s^2 I). The
fields stay affine, so that every fixed point is a recursion over the flow's steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Moves, adjoints, gaussian, moves_of, ode_end
from flow_problems import FunctionPolicy, gaussian_field, gaussian_gain
from torch import Tensor, nn

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.base import GeneratorNoise
from vla_trqam.methods.cgql import CGQLConfig
from vla_trqam.methods.external_kl import ExternalKLConfig
from vla_trqam.methods.fql import FQLConfig
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.residual import ResidualConfig
from vla_trqam.methods.reward_matching import RewardMatching, RewardMatchingConfig
from vla_trqam.methods.sqam import SQAMConfig
from vla_trqam.methods.trqam import SchemeName, TRQAMConfig

STEPS, VARIANCE, LAM, CURVATURE = 5, 0.5, 1.5, 2.0
W = (1.0, -0.5)
GAIN = gaussian(VARIANCE)


def quadratic(action: Tensor) -> Tensor:
    """``w . x - c |x|^2 / 2``: (B, 1, 2) -> (B,)."""
    x = action.flatten(1)
    return x @ torch.tensor(W) - CURVATURE / 2 * x.square().sum(dim=1)


class Affine(nn.Module):
    """``v_i(x) = gain_i x + offset_i``, at first the base's."""

    def __init__(self) -> None:
        super().__init__()
        gains = torch.tensor([gaussian_gain(i / STEPS, VARIANCE) for i in range(STEPS)])
        self.gain = nn.Parameter(gains.unsqueeze(1).repeat(1, len(W)))
        self.offset = nn.Parameter(torch.zeros(STEPS, len(W)))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        i = round(float(tau[0]) * STEPS)
        return self.gain[i] * x + self.offset[i]


class Unlimited(FunctionPolicy):
    """A robot that executes any number."""

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)


def method_of(config: Any) -> tuple[Any, Affine]:
    """A method whose critic is the quadratic and learns nothing."""
    torch.manual_seed(0)
    tuned = Affine()
    policy = Unlimited(tuned, gaussian_field(VARIANCE), (1, len(W)), STEPS)
    critic = Critic(CriticEnsemble(1, len(W), (4,), 1))
    if isinstance(config, RewardMatchingConfig):
        return RewardMatching(policy, critic, config, reward=lambda _, x: quadratic(x)), tuned
    method = make_method(policy, critic, config)
    for network in (method.critic.online, method.critic.target):
        unused = sum(float(p.detach().flatten()[0]) * 0 for p in network.parameters())
        network.forward = lambda _, action, unused=unused, **__: quadratic(action)[None] + unused
    return method, tuned


def transitions(rows: int) -> TransitionBatch:
    state, ones = torch.zeros(rows, 1), torch.ones(rows)
    return TransitionBatch(
        observation=state,
        action=torch.zeros(rows, 1, len(W)),
        chunk_return=0 * ones,
        next_observation=state,
        discount=0 * ones,
        terminated=ones.bool(),
        truncated=~ones.bool(),
        valid=torch.ones(rows, 1, dtype=torch.bool),
    )


# The family of adjoint matching.


@dataclass(frozen=True)
class FixedPoint:
    """Of every step the tuned field's gain and, for ``w = 1``, its offset: (K,) each."""

    gain: np.ndarray
    offset: np.ndarray


def fixed_point(moves: Moves, steps: int, correction: np.ndarray, slopes: np.ndarray) -> FixedPoint:
    """Where regressing ``v - v_base`` onto ``-correction a`` ends, ``a = -slope grad Q(x_1)``.

    The regression's best is the mean given x_i, ``kappa (w - c E[x_1 | x_i])``, and the end's mean
    under the chain that is tuned so is affine: ``P x + R``, from the last step to the first.
    """
    gains, offsets, slope, shift = [], [], 1.0, 0.0
    for i in reversed(range(steps)):
        kappa, base = correction[i] * slopes[i], GAIN(i / steps)
        if i == steps - 1 and moves.noiseless_end:  # sampled without the tuned field
            slope, shift = slope * (1 + base / steps), shift
        else:
            push = slope * moves.gain[i] * kappa
            slope = slope * (moves.keep[i] + moves.gain[i] * base) / (1 + push * CURVATURE)
            shift = (push + shift) / (1 + push * CURVATURE)
        gains.append(base - kappa * CURVATURE * slope)
        offsets.append(kappa * (1 - CURVATURE * shift))
    return FixedPoint(np.array(gains[::-1]), np.array(offsets[::-1]))


def end_of(moves: Moves, steps: int, found: FixedPoint) -> tuple[float, float]:
    """Mean (``w = 1``) and variance of the tuned chain's end."""
    mean, variance = 0.0, 1.0
    for i in range(steps):
        if i == steps - 1 and moves.noiseless_end:
            factor, push, noise = 1 + GAIN(i / steps) / steps, 0.0, 0.0
        else:
            factor = moves.keep[i] + moves.gain[i] * found.gain[i]
            push, noise = moves.gain[i] * found.offset[i], moves.variance[i]
        mean, variance = factor * mean + push, factor**2 * variance + noise
    return mean, variance


def halves(moves: Moves) -> np.ndarray:
    return moves.variance / moves.gain


def lean(moves: Moves) -> np.ndarray:
    return -adjoints(moves, GAIN)


def scalar(moves: Moves) -> np.ndarray:
    """The paired state's time."""
    return np.append(moves.tau, 1.0)[1:] if moves.pairs_with_next else moves.tau


HELD = {"dual_step_size": 0.0, "lam_init": LAM}
FAMILY: dict[str, tuple[Callable[..., Any], Any, float]] = {
    "trqam": (lambda **k: TRQAMConfig(**HELD, **k), lean, 1 / LAM),
    "trqam, scalar": (lambda **k: TRQAMConfig(adjoint="scalar", **HELD, **k), scalar, 1 / LAM),
    "qam": (lambda **k: QAMConfig(inverse_temperature=0.7, **k), lean, 0.7),
    "sqam": (lambda **k: SQAMConfig(inverse_temperature=0.7, **k), scalar, 0.7),
    # (2 V / B) / (2 + h lambda): of a KL per chunk.
    "external_kl": (
        lambda **k: ExternalKLConfig(dual_step_size=0.0, lam_init=4.0, kl_per_action=False, **k),
        lean,
        2 / (2 + 4.0 / STEPS),
    ),
    "reward_matching": (lambda **k: RewardMatchingConfig(**HELD, **k), lean, 1 / LAM),
}
SCHEMES: tuple[SchemeName, ...] = ("posterior", "shifted_euler")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_arrives_at_the_fixed_point_of_its_regression(
    name: str, scheme: SchemeName
) -> None:
    make, slopes, strength = FAMILY[name]
    method, tuned = method_of(make(scheme=scheme, max_grad_norm=1e6, actor_lr=0.01))
    generator, batch = torch.Generator().manual_seed(0), transitions(256)
    gains, offsets = [], []
    for update in range(400):
        method.update(batch, generator)
        if update >= 200:
            gains.append(tuned.gain.detach().clone())
            offsets.append(tuned.offset.detach().clone())
    chain = method.config.chain
    moves = moves_of(chain, STEPS)
    expected = fixed_point(moves, STEPS, strength * halves(moves), slopes(moves))
    gain, offset = torch.stack(gains).mean(dim=0), torch.stack(offsets).mean(dim=0)
    for dim, w in enumerate(W):
        np.testing.assert_allclose(gain[:, dim], expected.gain, atol=0.03)
        np.testing.assert_allclose(offset[:, dim], w * expected.offset, atol=0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_many_steps_the_fixed_point_is_the_tilted_gaussian(scheme: SchemeName) -> None:
    """``N(v w / lam, v)`` with ``1 / v = 1 / s^2 + c / lam``."""
    variance = 1 / (1 / VARIANCE + CURVATURE / LAM)
    mean, gaps = variance / LAM, []
    for steps in (25, 100, 400):
        chain = TRQAMConfig(scheme=scheme).chain
        moves = moves_of(chain, steps)
        found = fixed_point(moves, steps, halves(moves) / LAM, lean(moves))
        end = end_of(moves, steps, found)
        gaps.append(np.abs(np.array(end) / (mean, variance) - 1).max())
    # First order: four times the steps, about a quarter of the gap.
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    assert gaps[2] < 0.04


# Others.


def flow_slope() -> float:
    """The base's chunk is its noise times this."""
    return ode_end(STEPS, GAIN, 1.0, np.zeros(STEPS))


def test_fqls_one_step_is_the_flow_drawn_towards_the_best_action() -> None:
    """Of ``(alpha / n) (mu - f)^2 - (w mu - c mu^2 / 2)`` for each of the n numbers."""
    alpha = 3.0
    method, _ = method_of(
        FQLConfig(alpha=alpha, hidden_dims=(64,), max_grad_norm=1e6, actor_lr=3e-3)
    )
    generator, batch = torch.Generator().manual_seed(0), transitions(256)
    for _ in range(600):
        method.update(batch, generator)
    z = torch.linspace(-1.5, 1.5, 7).view(-1, 1, 1).expand(-1, 1, len(W))
    with torch.no_grad():
        found = method.one_step(torch.zeros(len(z), 1), z)[:, 0]
    pull = 2 * alpha / len(W)
    for dim, w in enumerate(W):
        expected = (pull * flow_slope() * z[:, 0, dim] + w) / (pull + CURVATURE)
        np.testing.assert_allclose(found[:, dim], expected, atol=0.05)


def test_cgqls_guidance_is_that_of_the_noisy_chunks_own_gradient() -> None:
    beta, theta = 1.3, 0.2
    method, _ = method_of(CGQLConfig(inverse_temperature=beta, guidance=theta))
    z = torch.linspace(-1.5, 1.5, 7).view(-1, 1, 1).expand(-1, 1, len(W))
    found = method.guided(torch.zeros(len(z), 1), z)[:, 0]
    for dim, w in enumerate(W):
        x, h = z[:, 0, dim].double().numpy(), 1 / STEPS
        for i in range(STEPS):
            tau, push = i * h, 0.0
            if i:
                push = theta * ((1 - tau) * beta * (w - CURVATURE * x) + x) / tau
            x = x + h * (GAIN(tau) * x + push)
        np.testing.assert_allclose(found[:, dim], x, rtol=1e-5, atol=1e-6)


def test_residual_rl_edits_to_the_best_action_or_to_the_edge_of_its_box() -> None:
    """At a temperature of nearly nothing."""
    scale = 0.4
    method, _ = method_of(
        ResidualConfig(
            edit_scale=scale,
            target_entropy=-20.0,
            edit_hidden_dims=(32,),
            max_grad_norm=1e6,
            actor_lr=1e-2,
        )
    )
    method.own["temperature"].log_value.data.fill_(-7.0)
    generator, batch = torch.Generator().manual_seed(0), transitions(64)
    for _ in range(500):
        method.update(batch, generator)
    rows = 4000, torch.device("cpu")
    context = torch.zeros(rows[0], 1)
    base, edited = (
        method.actor(which).chunk(context, GeneratorNoise(torch.Generator().manual_seed(3), *rows))
        for which in ("base", "tuned")
    )
    for dim, w in enumerate(W):
        flow = base[:, 0, dim]
        expected = flow + (w / CURVATURE - flow).clamp(-scale, scale)
        assert float((edited[:, 0, dim] - expected).abs().mean()) < 0.05

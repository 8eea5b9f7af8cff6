"""Claim 5's numbers are those of the page, and what computes them agrees with what does not."""

from pathlib import Path

import c5_theory
import numpy as np
import pytest
import torch
from chain_figure import GaussianFlow
from chain_figure import optimum as optimal_offsets
from line_chain import Mixture, Tilt, X, journey, optimum
from marked import marked

from vla_trqam.sde import sample_memoryless_sde
from vla_trqam.time_grid import TimeGrid
from vla_trqam.trust_region import path_kl

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
SCHEMES = c5_theory.SCHEMES


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("variance", [1.0, 0.1])
def test_the_grid_of_states_finds_a_gaussians_optimum(variance: float, name: str) -> None:
    """The library's own adjoint, sampler and KL know it too."""
    grid, base = TimeGrid(4, SCHEMES[name]), Mixture((0.0,), variance)
    gaps = optimum(base, np.ones_like, 1.0, grid)
    offsets = optimal_offsets(GaussianFlow(variance), grid).numpy()
    np.testing.assert_allclose(gaps, np.broadcast_to(offsets[:, None], gaps.shape), atol=1e-8)
    found, known = journey(base, gaps, grid), c5_theory.on_gaussian(variance, name, 4)
    kls = found.counted_kl, found.path_kl, found.terminal_kl
    theory = variance / 2
    expected = known.counted * theory, known.sampled * theory, known.terminal * theory
    assert kls == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_grids_two_modes_go_where_the_librarys_sampler_goes(name: str) -> None:
    base, grid = c5_theory.TWO_MODES, TimeGrid(4, SCHEMES[name])
    gaps = optimum(base, c5_theory.bump_slope, c5_theory.LAM, grid)
    found = journey(base, gaps, grid)

    def field(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(base.field(x.flatten().numpy(), float(tau[0]))[0]).view_as(x)

    def gap(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        row = gaps[round(float(tau[0]) * 4)]
        return torch.from_numpy(np.interp(x.flatten().numpy(), X, row)).view_as(x)

    def tuned(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return field(x, tau) + gap(x, tau)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 200_000, 1, 1, dtype=torch.float64, generator=generator)
    path = sample_memoryless_sde(tuned, noise[0], noise[1:], grid, base_velocity=field)
    along = [gap(x, torch.tensor([i / 4])) for i, x in enumerate(path.states)]
    assert found.counted_kl == pytest.approx(float(path_kl(torch.stack(along), grid)), rel=0.01)
    shares = np.histogram(path.x_1.flatten().numpy(), np.linspace(-3, 3, 13))[0] / 200_000
    density = np.histogram(found.end, np.linspace(-3, 3, 13), weights=found.before_last)[0]
    np.testing.assert_allclose(shares, density * (X[1] - X[0]), atol=0.01)


def test_the_tilts_kl_is_a_gaussians_closed_form() -> None:
    """``Q = x / 2`` on N(0, s^2) moves the mean by ``s^2 / (2 lam)``."""
    tilt = Tilt.of(Mixture((0.0,), 0.25), X / 2, 0.5)
    assert tilt.kl == pytest.approx(0.25**2 / (2 * 0.25), rel=1e-9)
    assert float((tilt.density * X).sum() * (X[1] - X[0])) == pytest.approx(0.25, rel=1e-9)


def test_the_worst_critic_reaches_the_most_there_is_and_half_of_the_lemma() -> None:
    for size in c5_theory.LEMMA:
        worst, most, bound = c5_theory.lemma_row(size)
        assert 0.98 * most < worst <= most + 1e-9
        assert worst <= bound / 2 + 1e-9


def test_the_page_holds_the_commands_numbers() -> None:
    parts, _ = c5_theory.report((2, 4))
    text = marked(PAGE, "c5")
    for name in ("optima", "lemma"):
        for row in parts[name].splitlines():
            assert row in text
    assert "**Proposition 1 holds**" in parts["verdicts"]
    assert "**Lemma 1 holds**" in parts["verdicts"]
    assert parts["verdicts"].splitlines()[-1] in text

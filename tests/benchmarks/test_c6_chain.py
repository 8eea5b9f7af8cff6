"""Claim 6's exact part: the page is the command's, and the closed forms are right."""

from pathlib import Path

import c6_chain
import numpy as np
import pytest
from chain_figure import GaussianFlow, solve
from line_chain import Mixture, X, optimum
from marked import marked
from update_step import Chain

from vla_trqam.time_grid import Posterior, TimeGrid

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"


@pytest.mark.parametrize("name", c6_chain.SCHEMES)
def test_the_quadratic_optimum_is_the_grids(name: str) -> None:
    variance, grid = 0.1, TimeGrid(4, c6_chain.SCHEMES[name])
    gaps = optimum(Mixture((0.0,), variance), lambda x: -x / variance, 1.0, grid)
    near = slice(len(X) // 2 - 20, len(X) // 2 + 21, 40)
    slopes = np.diff(gaps[:, near], axis=1).ravel() / np.diff(X[near])
    found = c6_chain.quadratic_optimum(GaussianFlow(variance), grid, "lean", 1 / variance)
    np.testing.assert_allclose(found, slopes, atol=1e-6)


def test_with_the_lean_adjoint_variance_and_mean_are_theorys_as_k_grows() -> None:
    found = c6_chain.Acting.of(0.3, 500, "posterior", "lean")
    numbers = (found.mean, found.mean_at_equal_kl, found.own_mean)
    assert numbers == pytest.approx([1.0] * 3, abs=0.02)
    assert (found.variance, found.own_variance) == pytest.approx((1.0, 1.0), abs=0.02)


@pytest.mark.parametrize("variance", [1.0, 0.1])
def test_the_scalar_adjoints_bias_is_what_it_comes_to_as_k_grows(variance: float) -> None:
    found = solve(variance, TimeGrid(1000, Posterior()), "scalar").acting_mean
    assert found == pytest.approx(c6_chain.scalar_bias(variance), rel=0.01)
    # tau^2 s^2 + (1 - tau)^2 at s = 1: half the integral of 1 / rho, which is sqrt(2) asinh(1).
    assert c6_chain.scalar_bias(1.0) == pytest.approx(np.sqrt(2) * np.arcsinh(1) / 2, rel=1e-6)


def test_the_page_holds_the_commands_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    c6_chain.main([])
    assert capsys.readouterr().out.strip() == marked(PAGE, "c6")


def test_the_times_are_beside_the_default_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(size: object, chains: list[Chain], budget: float) -> list[float]:
        return [0.01 * chain.num_flow_steps for chain in chains]

    monkeypatch.setattr(c6_chain, "measured", seconds)
    text = c6_chain.seconds_table(1.0, [3, 4])
    assert "| shifted_euler | 4 | scalar | 0.0400 | 2.00 |" in text
    assert "| posterior | 2 | lean | 0.0200 | 1.00 |" in text  # the preset's, not asked for

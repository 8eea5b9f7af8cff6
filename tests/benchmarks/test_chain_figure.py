"""The tables of docs/method.md are the command's, and the command's numbers are the exact ones."""

from pathlib import Path
from typing import NamedTuple

import chain_figure
import pytest

from vla_trqam.time_grid import Posterior, ShiftedEuler, TimeGrid

METHOD = Path(__file__).parents[2] / "docs" / "method.md"
SCHEMES = ("shifted Euler", "posterior")


class Exact(NamedTuple):
    """Multiples of what theory asks for, by recursions that share nothing with the library."""

    mean: float
    ode: float
    chain: float
    ratio: float
    chain_mean: float


def gain(tau: float, variance: float) -> float:
    return (tau * variance - (1 - tau)) / (tau**2 * variance + (1 - tau) ** 2)


def moves(scheme: str, count: int) -> list[tuple[float, float, float]]:
    """(A, B, V) of every step."""
    h, found = 1 / count, []
    for i in range(count):
        tau, u = i * h, (i + 1) * h
        if scheme == "shifted Euler":
            found.append((1 - h / u, 2 * h, h * 2 * (1 - tau + h) / u))
            continue
        # x_tau = c x_u + N(0, s), x_u = N(u x_1, (1 - u)^2): Bayes by precisions.
        c = tau / u
        s = (1 - tau) ** 2 - c**2 * (1 - u) ** 2
        v = 0.0 if i == count - 1 else 1 / (1 / (1 - u) ** 2 + c**2 / s)
        of_x, of_end = (0.0, 1.0) if i == count - 1 else (v * c / s, v * u / (1 - u) ** 2)
        found.append((of_x + of_end, of_end * (1 - tau), v))
    return found


def exact(scheme: str, count: int, variance: float) -> Exact:
    h, a, gaps, steps = 1 / count, -1.0, [0.0] * count, moves(scheme, count)
    euler = scheme == "shifted Euler"
    for i in reversed(range(count)):
        keep, field, noise = steps[i]
        before = (keep + field * gain((i + euler) * h, variance)) * a if i or euler else a
        gaps[i] = -noise / field * (before if euler else a)
        a = before
    mean, ode, chain_mean, chain, kl = 0.0, 1.0, 0.0, 1.0, 0.0
    for i, (keep, field, noise) in enumerate(steps):
        slope, gap = gain(i * h, variance), gaps[i]
        mean, ode = (1 + h * slope) * mean + h * gap, (1 + h * slope) * ode
        kl += field**2 / (2 * noise) * gap**2 if noise else 0.0
        if i == count - 1:
            chain_mean, chain = (1 + h * slope) * chain_mean, (1 + h * slope) ** 2 * chain
            continue
        factor = keep + field * slope
        chain_mean, chain = factor * chain_mean + field * gap, factor**2 * chain + noise
    ratio = mean**2 / (2 * ode**2) / kl
    parts = (mean, ode**2, chain)
    return Exact(*(part / variance for part in parts), ratio, chain_mean / variance)


def rows(lines: list[str]) -> list[list[float]]:
    return [[float(cell) for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


@pytest.fixture(scope="module")
def outcomes() -> list[list[float]]:
    return rows(list(chain_figure.outcomes_table()))


def test_the_tables_numbers_are_the_exact_ones(outcomes: list[list[float]]) -> None:
    assert {(row[0], row[1]) for row in outcomes} == {
        (variance, count) for variance in (1, 0.1, 0.01) for count in (2, 3, 4, 6, 10, 20, 50)
    }
    for variance, count, *numbers in outcomes:
        euler, posterior = (exact(scheme, int(count), variance) for scheme in SCHEMES)
        pairs = zip(euler, posterior, strict=True)
        means, odes, chains, ratios, _ = pairs
        assert odes[0] == odes[1]
        # Two digits are printed at least.
        assert numbers == pytest.approx([*means, odes[0], *chains, *ratios], rel=2e-2)


@pytest.mark.parametrize(
    ("variance", "count", "euler", "posterior", "ode"),
    [
        (1, 10, 0.88, 0.73, 0.77),
        (1, 4, 0.64, 0.48, 0.52),
        (0.1, 10, 1.17, 0.63, 0.69),
        (0.1, 4, 1.42, 0.34, 0.36),
        (0.01, 10, 1.98, 0.36, 0.38),
        (0.01, 4, 11.6, 0.078, 0.079),
    ],
)
def test_the_numbers_for_which_the_posterior_step_was_chosen(
    outcomes: list[list[float]],
    variance: float,
    count: int,
    euler: float,
    posterior: float,
    ode: float,
) -> None:
    (found,) = [row[2:5] for row in outcomes if row[:2] == [variance, count]]
    assert found == pytest.approx([euler, posterior, ode], rel=1.2e-2)


@pytest.mark.parametrize("variance", [1.0, 0.1, 0.01, 1e-4])
def test_with_the_posterior_step_what_acts_is_tilted_by_its_own_variance(variance: float) -> None:
    """Within a tenth; the chain is tilted exactly, and its KL is its end's."""
    for count in range(2, 51):
        found = chain_figure.solve(variance, TimeGrid(count, Posterior()))
        assert 0.9 < found.acting_mean / found.ode_variance <= 1.0 + 1e-9
        assert found.path_kl == pytest.approx(found.chain_variance, rel=1e-9)
        assert 1.0 - 1e-9 <= found.acting_kl / found.path_kl < 1.12


def test_shifted_euler_sends_its_own_chain_against_the_gradient_where_actions_are_narrow() -> None:
    assert all(exact("shifted Euler", count, 0.01).chain_mean < 0 for count in range(2, 11))
    assert all(exact("posterior", count, 0.01).chain_mean > 0 for count in range(2, 11))
    step = TimeGrid(10, ShiftedEuler()).steps[-2]
    assert step.adjoint_tau == 0.9
    assert step.keep + step.gain * gain(0.9, 0.01) == pytest.approx(-0.12, abs=5e-3)


def test_shifted_eulers_last_step_moves_what_acts_alike_whatever_the_base_is() -> None:
    for variance in (1.0, 0.01):
        gap = chain_figure.optimum(
            chain_figure.GaussianFlow(variance), TimeGrid(10, ShiftedEuler())
        )
        assert float(gap[-1]) / 10 == pytest.approx(2 * 0.1**2 * 1.1)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_posteriors_short_formulas_of_the_page(count: int) -> None:
    h = 1 / count
    for i, step in enumerate(TimeGrid(count, Posterior()).steps[:-1]):
        tau, u = i * h, (i + 1) * h
        assert step.noise_scale_squared == pytest.approx(2 * (1 - u) ** 2 / (u * (1 - tau)))
        weight = h * (u + tau - 2 * u * tau) / (2 * (1 - u) ** 2)
        assert step.kl_weight == pytest.approx(weight)
        assert step.keep == pytest.approx(tau / u + h**2 / (u * (1 - tau)))


def test_a_constant_offset_costs_what_its_steps_weigh() -> None:
    for scheme, costs in ((ShiftedEuler(), {10: 1.42}), (Posterior(), {10: 2.42, 4: 1.31, 2: 0.5})):
        for count, cost in costs.items():
            assert chain_figure.offset_kl(TimeGrid(count, scheme)) == pytest.approx(cost, abs=5e-3)


@pytest.mark.parametrize("last", [1.0, 0.0])
def test_what_an_offset_does_when_it_acts(last: float) -> None:
    """The ODE of N(0, s^2) in closed form at K = 2: x_1 = x_h + h v(x_h), x_h = x_0 + h v(x_0)."""
    flow, s2 = chain_figure.GaussianFlow(0.01), 0.01
    middle = 1 + 0.5 * (0.5 * s2 - 0.5) / (0.25 * s2 + 0.25)
    mean, deviation = middle * 0.5 + 0.5 * last, middle * 0.5
    found = chain_figure.acting_offset_kl(flow, TimeGrid(2), last=last)
    assert found == pytest.approx((mean / deviation) ** 2 / 2)


def test_the_page_holds_the_tables_that_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chain_figure.main([])
    tables, text = capsys.readouterr().out.strip().split("\n\n"), METHOD.read_text("utf-8")
    assert len(tables) == 2
    for table in tables:
        assert f"\n\n{table}\n\n" in text
    assert (METHOD.parent / "figures" / "chain.png").is_file()
    assert "(figures/chain.png)" in text


def test_the_figure_is_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures" / "chain.png"
    chain_figure.main(["--figure", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000
    assert f"wrote {path}" in capsys.readouterr().out

"""What a chain trains against what the ODE then does, where both are known exactly.

    python benchmarks/chain_figure.py
    python benchmarks/chain_figure.py --figure docs/figures/chain.png

The base is a Gaussian flow from N(0, 1) to N(0, s^2), the critic ``Q(x) = w x``, the tuned field
the minimiser of the adjoint matching loss on K steps. Theory asks for N(s^2 w / lam, s^2), the
tilted base, and a KL of ``s^2 w^2 / (2 lam^2)``. Printed is what the library's own adjoint,
samplers and KL make of it, as multiples of these: the tables of docs/method.md, whose figure is
drawn on demand. Nothing is random: affine maps are followed through the samplers in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from vla_trqam.adjoint import AdjointKind, lean_adjoint, scalar_adjoint
from vla_trqam.report.figures import BASE, BUDGET, TUNED, new_figure, save, use_log_axis
from vla_trqam.sde import Velocity, sample_memoryless_sde, sample_ode
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid
from vla_trqam.trust_region import path_kl

SCHEMES: dict[str, Scheme] = {"shifted Euler": ShiftedEuler(), "posterior": Posterior()}
COLORS = {"shifted Euler": BUDGET, "posterior": TUNED}
VARIANCES = (1.0, 0.1, 0.01)
STEPS = (2, 3, 4, 6, 10, 20, 50)
DRAWN_STEPS = (*range(2, 21), 30, 50)


@dataclass(frozen=True)
class GaussianFlow:
    """The exact field from N(0, 1) to N(0, s^2) along the linear path; one dimension.

    Attributes:
        variance: s^2.
    """

    variance: float

    def gain(self, tau: float) -> float:
        """The field's factor at ``tau``: ``v = gain x``."""
        spread = tau**2 * self.variance + (1.0 - tau) ** 2
        return (tau * self.variance - (1.0 - tau)) / spread

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        """The field."""
        return self.gain(float(tau[0])) * x

    def shifted(self, offsets: Tensor, grid: TimeGrid) -> Velocity:
        """The field plus a number a step, (K,)."""

        def velocity(x: Tensor, tau: Tensor) -> Tensor:
            return self.velocity(x, tau) + offsets[round(float(tau[0]) * grid.num_flow_steps)]

        return velocity


@dataclass(frozen=True)
class Outcome:
    """What the optimum on one grid is worth, each a multiple of what theory asks for.

    Attributes:
        acting_mean: the mean of what the tuned ODE does, over ``s^2 w / lam``.
        ode_variance: the variance of what the ODE does, base and tuned alike, over ``s^2``.
        chain_variance: the variance at the end of the sampled chain, over ``s^2``.
        path_kl: the KL that training measures, over ``s^2 w^2 / (2 lam^2)``.
    """

    acting_mean: float
    ode_variance: float
    chain_variance: float
    path_kl: float

    @property
    def acting_kl(self) -> float:
        """Of the tuned ODE's distribution from the base ODE's, in the unit of ``path_kl``."""
        return self.acting_mean**2 / self.ode_variance


def optimum(flow: GaussianFlow, grid: TimeGrid, adjoint: AdjointKind = "lean") -> Tensor:
    """``v_tuned - v_base`` of every step for ``w = lam = 1``, (K,): the loss's minimiser."""
    end = -torch.ones(1, 1, 1, dtype=torch.float64)

    def pullback(i: int, a: Tensor) -> Tensor:
        tau = grid.steps[i].adjoint_tau
        assert tau is not None
        return flow.gain(tau) * a

    lean = adjoint == "lean"
    paired = lean_adjoint(end, pullback, grid) if lean else scalar_adjoint(end, grid)
    factors = [step.variance / step.gain for step in grid.steps]
    return -paired.new_tensor(factors) * paired.flatten()


def solve(variance: float, grid: TimeGrid, adjoint: AdjointKind = "lean") -> Outcome:
    """Follows the optimum through the library's samplers."""
    flow = GaussianFlow(variance)
    gap = optimum(flow, grid, adjoint)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Outcome(
        acting_mean=float(sample_ode(flow.shifted(gap, grid), 0.0 * one, grid)) / variance,
        ode_variance=float(sample_ode(flow.velocity, one, grid)) ** 2 / variance,
        chain_variance=chain_variance(flow, grid) / variance,
        path_kl=2.0 * float(path_kl(gap.view(-1, 1, 1, 1), grid)) / variance,
    )


def chain_variance(flow: GaussianFlow, grid: TimeGrid) -> float:
    """Of the sampled chain's end: every random number's share, fed alone through the sampler."""
    numbers = torch.eye(grid.num_flow_steps + 1, dtype=torch.float64)[..., None, None]
    path = sample_memoryless_sde(
        flow.velocity, numbers[0], numbers[1:], grid, base_velocity=flow.velocity
    )
    return float(path.x_1.square().sum())


def offset_kl(grid: TimeGrid) -> float:
    """The path KL of a field that differs from the base by 1 in every step, in nats."""
    return float(path_kl(torch.ones(grid.num_flow_steps, 1, 1, 1, dtype=torch.float64), grid))


def acting_offset_kl(flow: GaussianFlow, grid: TimeGrid, *, last: float) -> float:
    """The KL between what the ODE of such a field does and what the base's does, in nats.

    Args:
        flow: the base.
        grid: the steps.
        last: the difference in the last step.
    """
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    offsets = torch.ones(grid.num_flow_steps, dtype=torch.float64)
    offsets[-1] = last
    mean = sample_ode(flow.shifted(offsets, grid), 0.0 * one, grid)
    return float((mean / sample_ode(flow.velocity, one, grid)).square() / 2.0)


def outcomes_table() -> Iterator[str]:
    """A row for every width of the base and number of steps, as Markdown."""
    columns = [f"mean, {name}" for name in SCHEMES] + ["variance, ODE"]
    columns += [f"{what}, {name}" for what in ("variance", "KL ratio") for name in SCHEMES]
    yield from _header("s²", "K", *columns)
    for variance in VARIANCES:
        for count in STEPS:
            found = [solve(variance, TimeGrid(count, scheme)) for scheme in SCHEMES.values()]
            numbers = [each.acting_mean for each in found]
            numbers += [found[0].ode_variance, *(each.chain_variance for each in found)]
            numbers += [each.acting_kl / each.path_kl for each in found]
            yield _row(f"{variance:g}", str(count), *map(_shown, numbers))


def offsets_table() -> Iterator[str]:
    """What a field that differs by 1 costs on the path, and what it does, as Markdown."""
    yield from _header("K", *map(str, STEPS))
    for name, scheme in SCHEMES.items():
        costs = [offset_kl(TimeGrid(count, scheme)) for count in STEPS]
        yield _row(f"path KL, {name}", *(f"{cost:.2f}" for cost in costs))
    for variance in (VARIANCES[0], VARIANCES[-1]):
        flow = GaussianFlow(variance)
        for last, note in ((1.0, ""), (0.0, ", 0 in the last step")):
            kls = [acting_offset_kl(flow, TimeGrid(count), last=last) for count in STEPS]
            label = f"what acts, s² = {variance:g}{note}"
            yield _row(label, *(_shown(kl) if kl >= 10 else f"{kl:.2f}" for kl in kls))


def _header(*cells: str) -> tuple[str, str]:
    return _row(*cells), "|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(number: float) -> str:
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.2g}" if number < 0.1 else f"{number:.3g}"


def draw(path: Path) -> Path:
    """Acting mean and variances against K, a column for every width of the base."""
    columns = len(VARIANCES)
    title = "What the chain aims at and what acts: base N(0, s²), Q = w·x"
    figure, axes = new_figure(title, rows=2, columns=columns, size=(9.0, 5.4))
    for column, variance in enumerate(VARIANCES):
        means, variances = axes[column], axes[columns + column]
        _draw_width(means, variances, variance)
        means.set_title(f"s² = {variance:g}", fontsize="medium")
        variances.set_xlabel("flow steps K")
        for panel in (means, variances) if column else ():
            panel.legend([], frameon=False)
    axes[0].set_ylabel("mean of what acts, over s²w/λ")
    axes[columns].set_ylabel("variance, over s²")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def _draw_width(means: Axes, variances: Axes, variance: float) -> None:
    for name, scheme in SCHEMES.items():
        found = [solve(variance, TimeGrid(count, scheme)) for count in DRAWN_STEPS]
        style: dict[str, Any] = {
            "color": COLORS[name],
            "marker": "o",
            "markersize": 2.5,
            "linewidth": 1.2,
        }
        means.plot(DRAWN_STEPS, [each.acting_mean for each in found], label=name, **style)
        chain = [each.chain_variance for each in found]
        variances.plot(DRAWN_STEPS, chain, label=f"chain, {name}", **style)
    ode = [each.ode_variance for each in found]
    for axes, label in ((means, "the ODE's own variance"), (variances, "ODE")):
        axes.plot(DRAWN_STEPS, ode, color=BASE, linestyle="--", linewidth=1.4, label=label)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="K = ∞")
        use_log_axis(axes)
        use_log_axis(axes, "x")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables; draws the figure where a path is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    arguments = parser.parse_args(argv)
    print("\n".join([*outcomes_table(), "", *offsets_table()]))
    if arguments.figure is not None:
        print(f"\nwrote {draw(arguments.figure)}")


if __name__ == "__main__":
    main()

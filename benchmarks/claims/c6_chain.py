"""Claim 6: what the chain and the adjoint do to the policy that acts, where it is known exactly.

    python benchmarks/claims/c6_chain.py --output docs/figures/c6_chain.png --page docs/claims.md
    OMP_NUM_THREADS=1 python benchmarks/claims/c6_chain.py --seconds 60 --page docs/claims.md

The base is N(0, s^2), the field exact, lam 1. With ``Q = w x`` theory asks for the mean ``s^2 w``
and leaves the variance; with ``Q = -x^2 / (2 s^2)`` it asks for the variance ``s^2 / 2`` and leaves
the mean. What acts is the tuned ODE of K steps at the minimiser of the loss. As the trust region
chooses lambda and not the user, the mean is also given *at one path KL*: what moves further for the
same nats is the better chain. With ``--seconds`` the updates are timed instead, in turns.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import above  # noqa: F401 (benchmarks/)
import numpy as np
import torch
from chain_figure import COLORS, SCHEMES, GaussianFlow, Outcome, solve
from evaluations import spent
from marked import put
from update_step import Chain, Size, default_preset, make_update

from vla_trqam.adjoint import AdjointKind
from vla_trqam.methods.trqam_config import SchemeName
from vla_trqam.report.figures import new_figure, save, use_log_axis
from vla_trqam.report.formats import table
from vla_trqam.time_grid import TimeGrid

VARIANCES = (1.0, 0.3, 0.1, 0.03, 0.01)
SHOWN = (1.0, 0.1, 0.01)
STEPS = (3, 4, 6, 10)
DRAWN_STEPS = (*range(2, 21), 30, 50)
ADJOINTS: tuple[AdjointKind, ...] = ("lean", "scalar")
KINDS = [(name, adjoint) for name in SCHEMES for adjoint in ADJOINTS]
NAMES: dict[str, SchemeName] = {"shifted Euler": "shifted_euler", "posterior": "posterior"}


def quadratic_optimum(
    flow: GaussianFlow, grid: TimeGrid, adjoint: AdjointKind, curvature: float
) -> list[float]:
    """The slope of ``v_tuned - v_base`` at every step for ``Q = -curvature x^2 / 2``, lam 1.

    The mean adjoint given the state is a line through 0; at every step the field that is sought is
    in its own expectation, ``D = f t r (A + B (g + D))``, which is solved for D. ``r`` is the slope
    of the adjoint behind the step, ``t`` what the adjoint kind makes of it there.
    """
    gaps, behind = [0.0] * grid.num_flow_steps, curvature
    for i in reversed(range(grid.num_flow_steps)):
        step, gain = grid.steps[i], flow.gain(grid.steps[i].tau)
        through = step.keep
        if step.adjoint_tau is not None:
            through += step.gain * flow.gain(step.adjoint_tau)
        if adjoint == "scalar":
            paired, through = grid.tau(i + grid.pairs_with_next), 1.0
        else:
            paired = 1.0 if grid.pairs_with_next else through
        factor = -step.variance / step.gain * paired
        if step.sampled_with_base:
            ahead = behind * (1.0 + grid.step_size * gain)
            gaps[i] = factor * ahead
        else:
            moved = step.keep + step.gain * gain
            gaps[i] = factor * behind * moved / (1.0 - factor * behind * step.gain)
            ahead = behind * (moved + step.gain * gaps[i])
        behind = through * ahead
    return gaps


def acting_variance(flow: GaussianFlow, grid: TimeGrid, slopes: Sequence[float]) -> float:
    """Of what the ODE makes of N(0, 1), the field being the base's plus these slopes."""
    end = 1.0
    for i, slope in enumerate(slopes):
        end *= 1.0 + grid.step_size * (flow.gain(grid.tau(i)) + slope)
    return end**2


@dataclass(frozen=True)
class Acting:
    """What acts at the optimum, each a multiple of what theory asks for.

    Attributes:
        mean: for the linear Q, over ``s^2 w``.
        mean_at_equal_kl: the same with lambda such that the path KL is the linear tilt's.
        own_mean: over the tilt of what the *base's ODE* does: its variance in place of s^2.
        variance: for the quadratic Q, over ``s^2 / 2``.
        own_variance: over the tilt of what the base's ODE does.
    """

    mean: float
    mean_at_equal_kl: float
    own_mean: float
    variance: float
    own_variance: float

    @classmethod
    def of(cls, variance: float, steps: int, name: str, adjoint: AdjointKind) -> Acting:
        """By one chain of K steps."""
        grid, flow = TimeGrid(steps, SCHEMES[name]), GaussianFlow(variance)
        linear: Outcome = solve(variance, grid, adjoint)
        slopes = quadratic_optimum(flow, grid, adjoint, 1.0 / variance)
        found = acting_variance(flow, grid, slopes)
        own = linear.ode_variance * variance
        return cls(
            mean=linear.acting_mean,
            mean_at_equal_kl=linear.acting_mean / np.sqrt(linear.path_kl),
            own_mean=linear.acting_mean / linear.ode_variance,
            variance=found / (variance / 2.0),
            own_variance=found * (1.0 / own + 1.0 / variance),
        )


def scalar_bias(variance: float) -> float:
    """The mean that acts with the scalar adjoint as K grows, over theory's: a function of s.

    ``dm = (g m + (1 - tau) / lam) dtau`` for the scalar, whose solution with the base's own spread
    ``rho^2 = tau^2 s^2 + (1 - tau)^2`` is ``m_1 = (s / lam) integral of (1 - tau) / rho``.
    """
    tau = (np.arange(200_000) + 0.5) / 200_000
    spread = np.sqrt(tau**2 * variance + (1 - tau) ** 2)
    return float(((1 - tau) / spread).mean() / np.sqrt(variance))


def acting_table() -> str:
    """Means and variances, one row a width of the base, K, chain and adjoint."""
    header = (
        *("s²", "K", "chain", "adjoint", "mean", "mean at equal path KL"),
        *("over its own tilt", "variance", "over its own tilt"),
    )
    return table(header, _acting_rows())


def _acting_rows() -> Iterator[list[str]]:
    for variance in SHOWN:
        for steps in STEPS:
            for name, adjoint in KINDS:
                found = Acting.of(variance, steps, name, adjoint)
                numbers = (found.mean, found.mean_at_equal_kl, found.own_mean)
                cells = [_shown(n) for n in (*numbers, found.variance, found.own_variance)]
                yield [f"{variance:g}", str(steps), name, adjoint, *cells]


def bias_table() -> str:
    """The scalar adjoint's mean over the lean one's, by the base's width."""
    header = ("s²", *(f"K = {k}, {name}" for k in STEPS for name in SCHEMES), "K = ∞")
    rows = [
        [f"{s2:g}", *(_shown(_ratio(s2, k, n)) for k in STEPS for n in SCHEMES), _shown(b)]
        for s2, b in ((s2, scalar_bias(s2)) for s2 in VARIANCES)
    ]
    return table(header, rows)


def _ratio(variance: float, steps: int, name: str) -> float:
    grid = TimeGrid(steps, SCHEMES[name])
    lean, scalar = (solve(variance, grid, adjoint).acting_mean for adjoint in ADJOINTS)
    return scalar / lean


def _shown(value: float) -> str:
    return f"{value:.3g}"


def verdict() -> str:
    """What the numbers say of the two chains and the two adjoints."""
    places = [(s2, k) for s2 in VARIANCES for k in STEPS]
    rows = []
    for name, adjoint in KINDS:
        found = [Acting.of(s2, k, name, adjoint) for s2, k in places]
        rows.append(
            f"- *{name}, {adjoint}*: the mean is {_span(f.own_mean for f in found)} times that of "
            f"the tilt of what the base itself does, the variance "
            f"{_span(f.own_variance for f in found)} times; at one path KL the mean is "
            f"{_span(f.mean_at_equal_kl for f in found)} of theory's."
        )
    wide, *_, narrow = VARIANCES
    return "\n".join(
        [
            f"Over s² from {narrow:g} to {wide:g} and K from {min(STEPS)} to {max(STEPS)}:",
            "",
            *rows,
            f"- The *scalar adjoint* moves the mean by {scalar_bias(wide):.2g} (s² = {wide:g}) to "
            f"{scalar_bias(narrow):.2g} (s² = {narrow:g}) times what theory asks as K grows: by "
            "the order of s, not of s². A larger λ takes the size back, but not the direction: of "
            "two dimensions the narrower moves too far.",
        ]
    )


def _span(values: Iterable[float]) -> str:
    listed = list(values)
    return f"{min(listed):.2g} to {_shown(max(listed))}"


def draw(path: Path) -> Path:
    """The mean at equal path KL and the variance, by K, and the scalar adjoint's bias by s²."""
    title = "What acts at the optimum, over what theory asks: base N(0, s²), K Euler steps"
    figure, axes = new_figure(title, rows=2, columns=3, size=(11.0, 6.0))
    for column, variance in enumerate(SHOWN):
        means, variances = axes[column], axes[3 + column]
        for name, adjoint in KINDS:
            found = [Acting.of(variance, k, name, adjoint) for k in DRAWN_STEPS]
            line: dict[str, Any] = {
                "color": COLORS[name],
                "linestyle": "-" if adjoint == "lean" else "--",
                "label": f"{name}, {adjoint}",
                "linewidth": 1.3,
            }
            means.plot(DRAWN_STEPS, [each.mean_at_equal_kl for each in found], **line)
            variances.plot(DRAWN_STEPS, [each.variance for each in found], **line)
        means.set_title(f"s² = {variance:g}", fontsize="medium")
        variances.set_xlabel("flow steps K")
        use_log_axis(variances)
        for panel in (means, variances):
            panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            use_log_axis(panel, "x")
        for panel in (means, variances) if column else (variances,):
            panel.legend([], frameon=False)
    axes[0].set_ylabel("mean at equal path KL")
    axes[3].set_ylabel("variance, quadratic Q")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def measured(size: Size, chains: Sequence[Chain], seconds: float) -> list[float]:
    """Median processor seconds of an update by each chain, all in turns."""
    updates = [make_update(size, chain) for chain in chains]
    for update in updates:
        update()
    found: list[list[float]] = [[] for _ in chains]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < 10:
        for update, own in zip(updates, found, strict=True):
            own += [spent(update) for _ in range(5)]
    return [median(own) for own in found]


def seconds_table(seconds: float, steps: Sequence[int]) -> str:
    """Seconds of one update at the default preset's size, all in turns, in this many threads."""
    size, default = default_preset()
    chains = [Chain(NAMES[name], k, adjoint) for k in steps for name, adjoint in KINDS]
    chains = list(dict.fromkeys([*chains, default]))
    found = measured(size, chains, seconds)
    best = dict(zip(chains, found, strict=True))[default]
    rows = [
        [chain.scheme, str(chain.num_flow_steps), chain.adjoint, f"{s:.4f}", f"{s / best:.2f}"]
        for chain, s in zip(chains, found, strict=True)
    ]
    where = f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread"
    day = datetime.now(UTC).date().isoformat()
    return (
        f"Processor seconds of one update at the default preset's size ({day}, {where} of a shared "
        f"machine; medians, in turns), and over the default's {default.label}:\n\n"
        + table(("chain", "K", "adjoint", "seconds", "ratio"), rows)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, draws where a path is given, and writes into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="PNG to draw")
    parser.add_argument("--page", type=Path, help="Markdown page to write the numbers into")
    parser.add_argument("--seconds", type=float, help="time the updates for about so long instead")
    given = parser.parse_args(arguments)
    if given.seconds is not None:
        torch.set_num_threads(1)
        name, text = "c6_seconds", seconds_table(given.seconds, STEPS)
    else:
        name, text = "c6", "\n\n".join([verdict(), acting_table(), bias_table()])
    print(text)
    if given.output is not None:
        print(f"\nwrote {draw(given.output)}")
    if given.page is not None:
        put(given.page, name, text)


if __name__ == "__main__":
    main()

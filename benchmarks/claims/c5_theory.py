"""Claim 5: TRQAM's theorem, proposition and lemma in numbers, where every answer is known.

    python benchmarks/claims/c5_theory.py
    python benchmarks/claims/c5_theory.py --output docs/figures/c5_theory.png --page docs/claims.md

*Theorem 1*: the path KL of the optimum is a function of lambda alone,
``D(lam) = E_tilted[Q] / lam - log E_base[exp(Q / lam)]``. *Proposition 1*: the KL of what comes out
is at most the path KL. *Lemma 1*: a critic wrong by at most eps moves the tilted distribution by at
most ``(exp(2 beta eps) - 1) / 2`` of total variation, with ``beta = 1 / lam``. The first two are of
continuous time; here is what is left of them with K steps, for both chains: on Gaussian bases with
a linear Q in closed form, on a base of two modes with a bump of reward on a grid of states. Nothing
is random; about a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import above  # noqa: F401 (benchmarks/)
import numpy as np
import torch
from chain_figure import COLORS, SCHEMES, GaussianFlow, chain_variance
from chain_figure import optimum as gaussian_optimum
from line_chain import WIDTH, Mixture, Numbers, Tilt, X, journey, optimum
from marked import put
from matplotlib.axes import Axes

from vla_trqam.report.figures import BASE, LOST, new_figure, save, use_log_axis
from vla_trqam.report.formats import table
from vla_trqam.sde import sample_memoryless_sde
from vla_trqam.time_grid import TimeGrid
from vla_trqam.trust_region import path_kl_per_step

STEPS = (2, 3, 4, 6, 10, 20, 40)
# In closed form more cost nothing.
MANY_STEPS = (100, 400)
VARIANCES = (1.0, 0.1, 0.01)
TWO_MODES, LAM = Mixture((-1.0, 1.0), 0.25), 1.0
LEMMA = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
ROUNDING = 1e-9


@dataclass(frozen=True)
class Found:
    """The optimum of one chain, over what Theorem 1 says of continuous time.

    Attributes:
        base: its name.
        scheme: the chain's name.
        steps: K.
        counted: the path KL as training counts it, over D(lam).
        sampled: that of the chain that is sampled, over D(lam).
        terminal: the KL of its end, over D(lam).
        distance: total variation between its end and the tilted base; None where not computed.
    """

    base: str
    scheme: str
    steps: int
    counted: float
    sampled: float
    terminal: float
    distance: float | None = None


def bump(x: Numbers) -> Numbers:
    """A reward on one of the two modes."""
    value: Numbers = np.exp(-0.5 * ((x - 1.0) / 0.5) ** 2)
    return value


def bump_slope(x: Numbers) -> Numbers:
    """Its derivative."""
    return -(x - 1.0) / 0.25 * bump(x)


def on_gaussian(variance: float, name: str, steps: int) -> Found:
    """N(0, s^2) with ``Q = x``, lam 1: D(lam) is ``s^2 / 2``; affine maps through the sampler."""
    grid, flow = TimeGrid(steps, SCHEMES[name]), GaussianFlow(variance)
    gap = gaussian_optimum(flow, grid)
    each = path_kl_per_step(gap.view(-1, 1, 1, 1), grid)
    sampled = [kl for kl, step in zip(each, grid.steps, strict=True) if not step.sampled_with_base]
    still = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    path = sample_memoryless_sde(
        flow.shifted(gap, grid), still[0], still[1:], grid, base_velocity=flow.velocity
    )
    terminal = float(path.x_1) ** 2 / (2.0 * chain_variance(flow, grid))
    theory = variance / 2.0
    return Found(
        f"N(0, {variance:g})",
        name,
        steps,
        float(each.sum()) / theory,
        float(sum(sampled)) / theory,
        terminal / theory,
    )


def on_two_modes(name: str, steps: int) -> Found:
    """Two modes and the bump, on the grid of states."""
    grid, theory = TimeGrid(steps, SCHEMES[name]), Tilt.of(TWO_MODES, bump(X), LAM)
    found = journey(TWO_MODES, optimum(TWO_MODES, bump_slope, LAM, grid), grid)
    kls = (found.counted_kl, found.path_kl, found.terminal_kl)
    counted, sampled, terminal = (kl / theory.kl for kl in kls)
    distance = found.distance(theory.density)
    return Found("two modes", name, steps, counted, sampled, terminal, distance)


def all_found(steps: Sequence[int]) -> list[Found]:
    """Every base, both chains."""
    more = (*steps, *MANY_STEPS)
    return [
        *(on_gaussian(s2, name, k) for s2 in VARIANCES for k in more for name in SCHEMES),
        *(on_two_modes(name, k) for k in steps for name in SCHEMES),
    ]


def elsewhere(steps: Sequence[int]) -> list[tuple[float, float]]:
    """(terminal KL, path KL of the sampled chain) of fields that are no optimum of anything."""
    shapes = [np.ones_like(X), X / 2, np.sin(2 * X), np.cos(5 * X), -np.sign(X)]
    pairs = []
    for count in steps:
        for scheme in SCHEMES.values():
            for shape in shapes:
                gaps = np.stack([shape * (0.2 + 0.3 * i / count) for i in range(count)])
                found = journey(TWO_MODES, gaps, TimeGrid(count, scheme))
                pairs.append((found.terminal_kl, found.path_kl))
    return pairs


def errors(size: float, density: Numbers) -> Iterator[Numbers]:
    """Wrong critics less the right one, at most ``size`` off: waves, and the worst there is."""
    for frequency in (0.5, 1.0, 2.0, 5.0, 20.0):
        for phase in (0.0, 1.0, 2.0):
            yield size * np.sin(frequency * X + phase)
    # Up where the share 1 / (1 + exp(beta eps)) is, down elsewhere: tanh(beta eps / 2) away.
    share = 1.0 / (1.0 + np.exp(-size / LAM))
    edge = X[np.searchsorted(np.cumsum(density) * WIDTH, share)]
    yield np.where(X > edge, size, -size)


def lemma_row(size: float) -> tuple[float, float, float]:
    """Largest distance that was found on the two modes; the largest there is; the lemma's bound."""
    right = Tilt.of(TWO_MODES, bump(X), LAM).density
    tilts = [Tilt.of(TWO_MODES, bump(X) + e, LAM).density for e in errors(LAM * size, right)]
    worst = max(float(0.5 * np.abs(tilt - right).sum() * WIDTH) for tilt in tilts)
    return worst, float(np.tanh(size / 2)), float(0.5 * np.expm1(2 * size))


def found_table(found: Sequence[Found]) -> str:
    """The optimum of every base and K, chain beside chain."""
    euler, posterior = SCHEMES
    header = (
        *("base", "K", f"path KL, {euler}", "as sampled", "of its end", "distance"),
        *(f"path KL, {posterior}", "of its end", "distance"),
    )
    rows = []
    by_place: dict[tuple[str, int], dict[str, Found]] = {}
    for each in found:
        by_place.setdefault((each.base, each.steps), {})[each.scheme] = each
    for (base, steps), pair in by_place.items():
        first, second = pair[euler], pair[posterior]
        euler_cells = (first.counted, first.sampled, first.terminal, first.distance)
        cells = (*euler_cells, second.counted, second.terminal, second.distance)
        rows.append([base, str(steps), *map(_shown, cells)])
    return table(header, rows)


def lemma_table() -> str:
    """Lemma 1 by size of the critic's error."""
    rows = [[f"{size:g}", *map(_shown, lemma_row(size))] for size in LEMMA]
    return table(("βε", "largest found", "largest there is, tanh(βε/2)", "Lemma 1"), rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def verdicts(found: Sequence[Found], pairs: Sequence[tuple[float, float]]) -> list[str]:
    """A sentence for each of the three, made of the numbers."""
    return [_theorem(found), _proposition(found, pairs), _lemma()]


def _theorem(found: Sequence[Found]) -> str:
    orders, ends = [], []
    for base, name in dict.fromkeys((f.base, f.scheme) for f in found):
        before, end = [f for f in found if (f.base, f.scheme) == (base, name)][-2:]
        errors = abs(before.counted - 1.0), abs(end.counted - 1.0)
        orders.append(float(np.log(errors[0] / errors[1]) / np.log(end.steps / before.steps)))
        ends.append(end)
    said = []
    for steps in sorted({end.steps for end in ends}):
        last = [end for end in ends if end.steps == steps]
        names = ", ".join(dict.fromkeys(end.base for end in last))
        values = [end.counted for end in last]
        said.append(f"{min(values):.3g} to {max(values):.3g} at K = {steps} ({names})")
    few = [f.counted for f in found if f.steps == 4]
    return (
        f"**Theorem 1 {'holds' if min(orders) > 0.5 else 'DOES NOT HOLD'} as K grows, and not at "
        f"the K that is used**: the path KL over D(λ) is, at the largest K of each base, "
        f"{' and '.join(said)}, with an error that falls like K to the power {-min(orders):.2f} to "
        f"{-max(orders):.2f}; at K = 4 it is {min(few):.2g} to {max(few):.3g}."
    )


def _proposition(found: Sequence[Found], pairs: Sequence[tuple[float, float]]) -> str:
    cases = [*((f.terminal, f.sampled) for f in found), *pairs]
    broken = sum(terminal > path + ROUNDING for terminal, path in cases)
    shares = [terminal / path for terminal, path in cases if path > ROUNDING]
    return (
        f"**Proposition 1 {'holds' if not broken else 'DOES NOT HOLD'}**: broken in {broken} of "
        f"{len(cases)} cases, {len(found)} optima and {len(pairs)} other fields; the end's KL is "
        f"{min(shares):.2g} to {max(shares):.2g} of the sampled chain's path KL."
    )


def _lemma() -> str:
    rows = [lemma_row(size) for size in LEMMA]
    broken = sum(worst > bound + ROUNDING for worst, _, bound in rows)
    shares = [worst / bound for worst, _, bound in rows]
    empty = min(size for size, row in zip(LEMMA, rows, strict=True) if row[2] >= 0.5)
    return (
        f"**Lemma 1 {'holds' if not broken else 'DOES NOT HOLD'}**: broken at {broken} of "
        f"{len(rows)} sizes of the error; the worst critic reaches {min(shares):.2g} to "
        f"{max(shares):.2g} of the bound, which is past 1/2 from βε = {empty:g} on."
    )


def draw(path: Path, found: Sequence[Found]) -> Path:
    """The gaps against K, and the lemma."""
    title = "Theorem 1, Proposition 1 and Lemma 1 where every answer is known"
    figure, (theorem, proposition, lemma) = new_figure(title, columns=3, size=(13.0, 4.0))
    bases = list(dict.fromkeys(each.base for each in found))
    for base, line in zip(bases, ("-", "--", ":", "-."), strict=True):
        for name in SCHEMES:
            own = [f for f in found if (f.base, f.scheme) == (base, name)]
            style: dict[str, Any] = {"color": COLORS[name], "linestyle": line, "linewidth": 1.3}
            steps = [f.steps for f in own]
            label = f"{name}, {base}"
            theorem.plot(steps, [abs(f.counted - 1) for f in own], label=label, **style)
            shares = [f.terminal / f.sampled if f.sampled > ROUNDING else np.nan for f in own]
            proposition.plot(steps, shares, label=label, **style)
    theorem.set_title("path KL at the optimum: |its share of D(λ) - 1|", fontsize="medium")
    proposition.set_title("the end's KL over the path KL", fontsize="medium")
    proposition.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    use_log_axis(theorem)
    for axes in (theorem, proposition):
        use_log_axis(axes, "x")
        axes.set_xlabel("flow steps K")
    theorem.legend(frameon=False, fontsize="xx-small")
    proposition.legend([], frameon=False)
    _draw_lemma(lemma)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def _draw_lemma(axes: Axes) -> None:
    rows = [lemma_row(size) for size in LEMMA]
    worst, most, bound = zip(*rows, strict=True)
    axes.plot(LEMMA, bound, color=LOST, label="Lemma 1")
    axes.plot(LEMMA, most, color=BASE, linestyle="--", label="tanh(βε/2)")
    axes.plot(LEMMA, worst, "o", color="black", markersize=4, label="worst critic found")
    axes.set_title("distance of the tilted base, by the critic's error", fontsize="medium")
    axes.set_xlabel("βε")
    use_log_axis(axes)
    use_log_axis(axes, "x")


def report(steps: Sequence[int]) -> tuple[Mapping[str, str], list[Found]]:
    """Tables and verdicts by name, and the optima."""
    found = all_found(steps)
    pairs = elsewhere([k for k in steps if k <= 10][-2:])
    parts = {
        "verdicts": "\n".join(f"- {line}" for line in verdicts(found, pairs)),
        "optima": found_table(found),
        "lemma": lemma_table(),
    }
    return parts, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, draws where a path is given, and writes into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="PNG to draw")
    parser.add_argument("--page", type=Path, help="Markdown page to write the numbers into")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="K, each at least 2")
    given = parser.parse_args(arguments)
    parts, found = report(given.steps)
    text = "\n\n".join(parts.values())
    print(text)
    if given.output is not None:
        print(f"\nwrote {draw(given.output, found)}")
    if given.page is not None:
        put(given.page, "c5", text)


if __name__ == "__main__":
    main()

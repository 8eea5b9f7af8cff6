"""The memoryless chain of one number, solved on a grid of states: nothing is sampled or trained.

The base is a mixture of Gaussians, whose field is known exactly, the critic any function of the
action. What adjoint matching then aims at is found backwards, step by step: the mean adjoint given
the state, at which the field that is sought takes its own expectation. Where the chain goes is
found forwards, by its transition densities. The chain's numbers (A, B, V) are the library's, the
rest shares nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

from vla_trqam.time_grid import Step, TimeGrid

Numbers = NDArray[np.float64]
Function = Callable[[Numbers], Numbers]

LIMIT, NODES = 8.0, 1201
X: Numbers = np.linspace(-LIMIT, LIMIT, NODES, dtype=np.float64)
WIDTH = float(X[1] - X[0])
_POINTS, _WEIGHTS = hermegauss(32)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
ROUNDS, TOLERANCE = 400, 1e-9


@dataclass(frozen=True)
class Mixture:
    """Equally likely Gaussians of one variance as the action's distribution.

    Attributes:
        means: their centres.
        variance: shared.
    """

    means: tuple[float, ...]
    variance: float

    def density(self, x: Numbers) -> Numbers:
        """Of the action."""
        offset = x[:, None] - np.array(self.means)
        parts = np.exp(-0.5 * offset**2 / self.variance)
        density: Numbers = parts.mean(1) / np.sqrt(2 * np.pi * self.variance)
        return density

    def field(self, x: Numbers, tau: float) -> tuple[Numbers, Numbers]:
        """``E[x_1 - x_0 | x_tau = x]`` and its slope in x."""
        means = np.array(self.means)
        spread = tau**2 * self.variance + (1 - tau) ** 2
        offset = x[:, None] - tau * means
        logs = -0.5 * offset**2 / spread
        weight = np.exp(logs - logs.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        gain = (tau * self.variance - (1 - tau)) / spread
        each, pull = means + gain * offset, -offset / spread
        turned = weight * (pull - (weight * pull).sum(1, keepdims=True))
        return (weight * each).sum(1), gain + (turned * each).sum(1)


@dataclass(frozen=True)
class Tilt:
    """``pi_base exp(Q / lam) / Z``, by quadrature.

    Attributes:
        density: on the grid.
        kl: from the base: ``E[Q] / lam - log Z``, a function of lam alone.
    """

    density: Numbers
    kl: float

    @classmethod
    def of(cls, base: Mixture, value: Numbers, lam: float) -> Tilt:
        """Of the critic's values on the grid."""
        top = float(value.max())
        weight = base.density(X) * np.exp((value - top) / lam)
        mass = weight.sum() * WIDTH
        density = weight / mass
        mean = float((density * value).sum() * WIDTH)
        return cls(density, (mean - top) / lam - float(np.log(mass)))


def optimum(base: Mixture, slope: Function, lam: float, grid: TimeGrid) -> Numbers:
    """``v_tuned - v_base`` at every step and state, (K, NODES): the loss's minimiser.

    ``Delta_i(x) = -V / (lam B) E[a | X_i = x]`` with the lean adjoint that the grid pairs with the
    step, along paths of the tuned chain, which ``Delta_i`` itself moves.

    Args:
        base: the base.
        slope: ``dQ/dx``.
        lam: lambda.
        grid: the chain.
    """
    gaps, behind = np.zeros((grid.num_flow_steps, NODES)), -slope(X)
    for i in reversed(range(grid.num_flow_steps)):
        step = grid.steps[i]
        value, _ = base.field(X, step.tau)
        through = _through(base, step)
        factor = -step.variance / (lam * step.gain)
        if step.sampled_with_base:
            ahead = np.interp(X + grid.step_size * value, X, behind)
            gaps[i] = factor * (ahead if grid.pairs_with_next else through * ahead)
        else:
            paired = np.ones(NODES) if grid.pairs_with_next else through
            ahead = _meeting(step, value, factor * paired, behind)
            gaps[i] = factor * paired * ahead
        behind = through * ahead
    return gaps


def _through(base: Mixture, step: Step) -> Numbers:
    """``A + B J``; A alone where the chain asks for no Jacobian, for nobody reads on from there."""
    if step.adjoint_tau is None:
        return np.full(NODES, step.keep)
    return step.keep + step.gain * base.field(X, step.adjoint_tau)[1]


def _meeting(step: Step, value: Numbers, factor: Numbers, behind: Numbers) -> Numbers:
    """``n(x) = E[a_{i+1} | X_i = x]`` under the step whose field is ``value + factor n(x)``."""
    spread = np.sqrt(step.variance) * _POINTS
    found = np.zeros(NODES)
    for _ in range(ROUNDS):
        centre = step.keep * X + step.gain * (value + factor * found)
        mean = np.interp(centre[:, None] + spread, X, behind) @ _WEIGHTS
        if np.abs(mean - found).max() < TOLERANCE:
            return mean
        # Half way: with strong tilts the whole way overshoots.
        found += 0.5 * (mean - found)
    raise ArithmeticError("the chain's optimum was not found: take a larger lam")


@dataclass(frozen=True)
class Journey:
    """What two chains from one start do, whose fields differ by given gaps.

    Attributes:
        path_kl: of the sampled chains, exact.
        counted_kl: as training counts it; larger where a noiseless step is counted.
        terminal_kl: of their ends.
        before_last: the tuned chain's density one step before its end.
        end: where the last step, the base's, leads from every state.
    """

    path_kl: float
    counted_kl: float
    terminal_kl: float
    before_last: Numbers
    end: Numbers

    def distance(self, density: Numbers) -> float:
        """Total variation between the tuned chain's end and a density on the grid."""
        there = np.interp(self.end, X, density) * np.gradient(self.end, X)
        return float(0.5 * np.abs(self.before_last - there).sum() * WIDTH)


def journey(base: Mixture, gaps: Numbers, grid: TimeGrid) -> Journey:
    """Follows the densities of both chains.

    The last step of a chain that ends with the base's is one map of the line onto itself that keeps
    the order (a denoiser's), so the ends are as far apart as the states before them.
    """
    first = np.exp(-0.5 * X**2) / np.sqrt(2 * np.pi)
    tuned, plain, path, counted = first, first, 0.0, 0.0
    for step, gap in zip(grid.steps, gaps, strict=True):
        cost = step.kl_weight * float((tuned * gap**2).sum() * WIDTH)
        counted += cost
        value, _ = base.field(X, step.tau)
        if step.sampled_with_base:
            end = X + grid.step_size * value
            assert (np.diff(end) > 0).all(), "the last step changes the order"
            return Journey(path, counted, _kl(tuned, plain), tuned, end)
        path += cost
        tuned = _moved(tuned, step, value + gap)
        plain = _moved(plain, step, value)
    return Journey(path, counted, _kl(tuned, plain), tuned, X)


def _moved(density: Numbers, step: Step, value: Numbers) -> Numbers:
    centre = step.keep * X + step.gain * value
    rows = np.exp(-0.5 * (X[:, None] - centre) ** 2 / step.variance)
    moved: Numbers = rows @ density
    # What leaves the grid is less than rounding for the bases here.
    return moved / (moved.sum() * WIDTH)


def _kl(first: Numbers, second: Numbers) -> float:
    there = first > 1e-300
    ratio = np.log(first[there] / np.maximum(second[there], 1e-300))
    return float((first[there] * ratio).sum() * WIDTH)

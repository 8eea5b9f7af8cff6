"""The chains from their definitions, in plain float64 numbers: what the library is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler


@dataclass(frozen=True)
class Moves:
    """``x' = A x + B v(x, tau) + sqrt(V) eps`` for every step, (K,) each.

    Attributes:
        tau: where the field is asked.
        keep: A.
        gain: B.
        variance: V.
        adjoint_tau: where the base's Jacobian is asked.
        pairs_with_next: whether step i's adjoint is the one behind it.
        noiseless_end: whether the last step is sampled as ``x + h v_base`` instead.
    """

    tau: np.ndarray
    keep: np.ndarray
    gain: np.ndarray
    variance: np.ndarray
    adjoint_tau: np.ndarray
    pairs_with_next: bool
    noiseless_end: bool

    def __len__(self) -> int:
        return len(self.tau)


def bayes_moves(steps: int) -> Moves:
    """The posterior chain by conditioning Gaussians, without a formula for A, B or V.

    On the linear path x_u given x_1 is N(u x_1, (1 - u)^2). Going back to tau, the Markov process
    with these marginals shrinks by c = tau / u and adds the noise that is missing. Given x_tau too,
    x_u is Gaussian, with a mean that is linear in x_tau and x_1; and x_1 is x_tau + (1 - tau) v.
    """
    tau = np.arange(steps) / steps
    rows = []
    for t, u in zip(tau, np.append(tau[1:], 1.0), strict=True):
        c = t / u
        covariance = np.array([[(1 - u) ** 2, c * (1 - u) ** 2], [c * (1 - u) ** 2, (1 - t) ** 2]])
        slope = covariance[0, 1] / covariance[1, 1]
        of_x_tau, of_x_1 = slope, u - slope * t
        rest = covariance[0, 0] - slope * covariance[0, 1]
        rows.append((of_x_tau + of_x_1, of_x_1 * (1 - t), rest))
    keep, gain, variance = np.array(rows).T
    return Moves(tau, keep, gain, variance, tau, True, True)


def euler_moves(steps: int, scheme: ShiftedEuler) -> Moves:
    """Euler-Maruyama of ``dX = (2 v - X / tau) dtau + g dW`` with both ends of time shifted."""
    tau, h = np.arange(steps) / steps, 1 / steps
    d = scheme.time_shift * h
    noise = 2 * (1 - tau + d) / (tau + d)
    asked = tau + h if scheme.adjoint_time == "next" else tau
    end = scheme.final_step == "noiseless_base"
    return Moves(
        tau, 1 - h / (tau + d), np.full(steps, 2 * h), h * noise, asked, False, noiseless_end=end
    )


def moves_of(scheme: Scheme, steps: int) -> Moves:
    if isinstance(scheme, Posterior):
        return bayes_moves(steps)
    assert isinstance(scheme, ShiftedEuler)
    return euler_moves(steps, scheme)


Gain = Callable[[float], float]
"""The factor of a field ``v(x, tau) = gain(tau) x``."""


def gaussian(variance: float) -> Gain:
    """Of the field that carries N(0, 1) to N(0, variance) along the linear path."""
    return lambda tau: (tau * variance - (1 - tau)) / (tau**2 * variance + (1 - tau) ** 2)


def chain_variance(moves: Moves, gain: Gain) -> float:
    """Of the sampled chain's end."""
    found = 1.0
    for i, tau in enumerate(moves.tau):
        if i == len(moves) - 1 and moves.noiseless_end:
            found *= (1 + gain(tau) / len(moves)) ** 2
        else:
            found *= (moves.keep[i] + moves.gain[i] * gain(tau)) ** 2
            found += moves.variance[i]
    return found


def ode_end(steps: int, gain: Gain, start: float, offsets: np.ndarray) -> float:
    """Where Euler on ``v = gain(tau) x + offset_i`` arrives."""
    x, h = start, 1 / steps
    for i, offset in enumerate(offsets):
        x += h * (gain(i * h) * x + offset)
    return x


def ode_variance(steps: int, gain: Gain) -> float:
    return ode_end(steps, gain, 1.0, np.zeros(steps)) ** 2


def adjoints(moves: Moves, gain: Gain) -> np.ndarray:
    """For ``Q(x) = x``, the adjoint paired with every step: (K,)."""
    states = np.empty(len(moves) + 1)
    states[-1] = -1.0
    for i in reversed(range(len(moves))):
        slope = moves.keep[i] + moves.gain[i] * gain(moves.adjoint_tau[i])
        states[i] = slope * states[i + 1]
    return states[1:] if moves.pairs_with_next else states[:-1]


def optimal_offsets(moves: Moves, gain: Gain, lam: float) -> np.ndarray:
    """``v_tuned - v_base`` at the optimum of the discretised problem for ``Q(x) = x``."""
    return -moves.variance / (lam * moves.gain) * adjoints(moves, gain)


def chain_mean(moves: Moves, gain: Gain, offsets: np.ndarray) -> float:
    """Of the sampled chain's end, started at mean 0."""
    mean = 0.0
    for i, tau in enumerate(moves.tau):
        if i == len(moves) - 1 and moves.noiseless_end:
            mean *= 1 + gain(tau) / len(moves)
        else:
            mean = moves.keep[i] * mean + moves.gain[i] * (gain(tau) * mean + offsets[i])
    return mean


def offset_kl(moves: Moves, offsets: np.ndarray) -> float:
    """Of the chain whose field is the base's plus these; a step without noise costs nothing."""
    noisy = moves.variance > 0
    each = moves.gain[noisy] ** 2 / (2 * moves.variance[noisy]) * offsets[noisy] ** 2
    return float(each.sum())

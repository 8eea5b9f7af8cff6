"""The best of n chunks of a base that is known, by a critic that is known: order statistics."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_trqam.methods.base import GeneratorNoise
from vla_trqam.methods.ifql import BestOfN

ROWS, SPREAD = 200_000, 0.7
LARGEST = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 4: 1.029375}
"""The mean of the largest of so many standard normal numbers."""
POLICY = SimpleNamespace(features=lambda context: context, executed=lambda chunk: chunk)


class Gaussian:
    """A base of N(0, SPREAD²): its flow carries noise straight to where it ends."""

    def chunk(self, context: Tensor, noise: Any) -> Tensor:
        return SPREAD * noise.normal((1, 1))


class TwoModes:
    """-1 or 1, as often."""

    def chunk(self, context: Tensor, noise: Any) -> Tensor:
        return noise.normal((1, 1)).sign()


def chosen(base: Any, value: Any, n: int) -> Tensor:
    """(ROWS,) the numbers that act, by a critic of two heads of which the second is no lower."""

    def heads(features: Tensor, chunk: Tensor) -> Tensor:
        q = value(chunk.view(-1))
        return torch.stack([q, q + chunk.view(-1).abs()])

    noise = GeneratorNoise(torch.Generator().manual_seed(n), ROWS, torch.device("cpu"))
    context: Any = torch.zeros(ROWS, 1)
    return BestOfN(POLICY, base, heads, n).chunk(context, noise).view(-1)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", LARGEST)
@pytest.mark.parametrize("slope", [3.0, -0.2])
def test_by_a_linear_critic_it_is_the_largest_of_n(n: int, slope: float) -> None:
    found = chosen(Gaussian(), lambda a: slope * a, n)
    expected = math.copysign(SPREAD * LARGEST[n], slope)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * SPREAD / math.sqrt(ROWS))
    # The larger of two normal numbers has their own second moment.
    if n == 2:
        assert float(found.square().mean()) == pytest.approx(SPREAD**2, rel=0.02)


def test_by_a_quadratic_critic_it_is_the_nearest_to_the_best() -> None:
    found = chosen(Gaussian(), lambda a: -a.square(), 2).abs()
    expected = SPREAD * 2 * (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert float(found.mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_of_two_modes_the_better_one_is_missed_when_none_of_n_is_of_it(n: int) -> None:
    share = float((chosen(TwoModes(), lambda a: a, n) > 0).float().mean())
    assert share == pytest.approx(1 - 0.5**n, abs=0.005)

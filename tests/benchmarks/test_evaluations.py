"""The counter of evaluations counts what it says, and the methods' pages are the commands'."""

import shutil
from pathlib import Path

import evaluations
import method_pages
import pytest
import torch
from evaluations import Counts, Meter, Timed, counts_of, in_steps
from marked import marked
from torch import Tensor, nn

from vla_trqam.errors import UserError
from vla_trqam.methods.registry import METHODS
from vla_trqam.methods.trqam import TRQAMConfig

PAGES = Path(__file__).parents[2] / "docs" / "methods"


class Line(nn.Module):
    """``weight x``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def velocity(self, x: Tensor, tau: Tensor, context: object) -> Tensor:
        return (self.weight * x).sin()


@pytest.fixture
def line() -> tuple[Line, Meter]:
    found, meter = Line(), Meter(rows=4)
    meter.watch(found, "velocity", "field", 0)
    return found, meter


def test_a_part_of_the_batch_is_a_part_of_an_evaluation(line: tuple[Line, Meter]) -> None:
    field, meter = line
    for rows in (4, 2, 12):
        field.velocity(torch.ones(rows, 1), torch.zeros(rows), None)
    assert meter.counts == {"field": 4.5}


def test_a_vector_jacobian_product_does_not_count_for_the_weights(
    line: tuple[Line, Meter],
) -> None:
    field, meter = line
    x = torch.ones(4, 1, requires_grad=True)
    value = field.velocity(x, torch.zeros(4), None)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(slope, 2 * torch.tensor(2.0).cos().expand(4, 1))
    assert meter.counts == {"field": 1, "field to input": 1}


def test_what_goes_back_through_a_chain_counts_at_every_link(line: tuple[Line, Meter]) -> None:
    field, meter = line
    x = torch.ones(4, 1)
    for _ in range(3):
        x = field.velocity(x, torch.zeros(4), None)
    assert meter.counts == {"field": 3}
    x.sum().backward()
    assert meter.counts == {"field": 3, "field to input": 2, "field to weights": 3}
    assert field.weight.grad is not None


def test_a_loss_that_leaves_an_evaluation_out_does_not_count_it(line: tuple[Line, Meter]) -> None:
    field, meter = line
    first, _ = (field.velocity(torch.ones(4, 1), torch.zeros(4), None) for _ in range(2))
    first.sum().backward()
    assert meter.counts == {"field": 2, "field to weights": 1}


@pytest.mark.parametrize("k", [4, 10])
def test_the_counts_are_those_that_are_known(k: int) -> None:
    def trqam(**knobs: object) -> Counts:
        return counts_of(TRQAMConfig(**knobs), k)  # type: ignore[arg-type]

    assert trqam() == Counts(3 * k, k - 1, k, 1, k, 0)
    assert trqam(adjoint="scalar") == Counts(3 * k, 0, k, 1, k, 0)
    assert trqam(scheme="shifted_euler") == Counts(4 * k, k, k, 1, k, 0)
    assert counts_of(METHODS["fql"].config(), k) == Counts(k, 0, 0, 1, 0, 0)
    assert counts_of(METHODS["ifql"].config(), k) == Counts(0, 0, 0, 0, 32 * k, 32)
    assert counts_of(METHODS["dsrl"].config(), k) == Counts(2 * k, 0, 0, 1, k, 0)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((12, 30, 18), "3K"),
        ((3, 9, 5), "K - 1"),
        ((13, 31, 19), "3K + 1"),
        ((0, 0, 0), "0"),
        ((5, 5, 5), "5"),
        ((16, 100, 36), "16 at K = 4, 100 at K = 10"),
    ],
)
def test_a_count_is_shown_as_a_function_of_k(values: tuple[int, int, int], shown: str) -> None:
    assert in_steps(*values) == shown


def test_the_page_has_the_counts_of_every_method() -> None:
    assert marked(PAGES / "README.md", "evaluations") == evaluations.counts_table()


def test_the_pages_have_the_requirements_and_knobs_of_the_code(tmp_path: Path) -> None:
    copy = tmp_path / "methods"
    shutil.copytree(PAGES, copy)
    assert method_pages.write(copy) == []
    page = copy / "fql.md"
    page.write_text(page.read_text("utf-8").replace("| `alpha` | `10.0` |", "| `alpha` | `9` |"))
    assert method_pages.write(copy) == [page]
    assert page.read_text("utf-8") == (PAGES / "fql.md").read_text("utf-8")


def test_a_page_without_the_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin speed -->\n")
    with pytest.raises(UserError, match=r"page.md has no <!-- begin speed --> ... <!-- end speed"):
        marked(page, "speed")


def test_a_rate_is_the_default_methods_time_over_a_methods_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"trqam": 0.02, "fql": 0.04}

    def timed(name: str) -> Timed:
        calls = {"update": seconds.get(name, 0.01), "act": 0.001}
        return Timed(*(lambda spent=spent: spent for spent in calls.values()), [], [])

    monkeypatch.setattr(evaluations, "timed", timed)
    monkeypatch.setattr(evaluations, "spent", lambda call: call())
    text = evaluations.speed_table(0.0)
    assert "| trqam | 20.00 | 1.00 | 1.00 |" in text
    assert "| fql | 40.00 | 1.00 | 0.50 |" in text

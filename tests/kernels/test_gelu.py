import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vla_trqam.kernels.gelu import tanh_gelu, tanh_gelu_and_slope

EDGES = [0.0, -0.0, 1e-20, -1e-20, 1e-4, -0.75, 3.0, -5.0, 9.0, -12.0, 40.0, -40.0, 1e4, -1e4, 1e12]


def points(dtype: torch.dtype) -> Tensor:
    spread = torch.linspace(-8, 8, 4001, dtype=dtype)
    return torch.cat([spread, torch.tensor(EDGES, dtype=dtype)])


def torch_gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_(True)
    value = F.gelu(z, approximate="tanh")
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_value_and_slope_are_torchs(dtype: torch.dtype, atol: float) -> None:
    z = points(dtype)
    expected, expected_slope = torch_gelu_and_slope(z)
    value, slope = tanh_gelu_and_slope(z)
    torch.testing.assert_close(value, expected, rtol=2e-6 if atol > 1e-10 else 1e-13, atol=atol)
    # The slope is a difference of nearly equal numbers: twice the error of torch's own, 2e-6.
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=4 * atol)


def test_the_three_ways_to_the_value_agree_to_the_bit() -> None:
    z = points(torch.float32)
    without_gradient = tanh_gelu(z)
    with_gradient = tanh_gelu(z.clone().requires_grad_(True))
    assert torch.equal(without_gradient, with_gradient.detach())
    assert torch.equal(without_gradient, tanh_gelu_and_slope(z)[0])


def test_the_gradient_passes_gradcheck() -> None:
    z = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tanh_gelu, (z,), eps=1e-6, atol=1e-8)


def test_the_input_is_left_alone() -> None:
    z = points(torch.float32)
    copy = z.clone()
    tanh_gelu(z)
    tanh_gelu_and_slope(z)
    assert torch.equal(z, copy)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    z = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        assert not tanh_gelu(z).requires_grad
    value, slope = tanh_gelu_and_slope(z.detach())
    assert not value.requires_grad
    assert not slope.requires_grad

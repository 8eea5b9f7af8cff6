"""A run by plain torch."""

import sys

import pytest
import yaml
from toy_files import metrics_lines

from vla_trqam.kernel_choice import by_kernels, chosen_kernels

KERNELS = ("gelu", "ensemble", "mlp_path")


@pytest.mark.parametrize("method", ["trqam", "dsrl"])
def test_a_run_by_plain_torch_calls_no_kernel_and_is_gone_on_with_so(
    method, tiny, resume, no_conclusion, tmp_path, monkeypatch
):
    for name in KERNELS:
        monkeypatch.setitem(sys.modules, f"vla_trqam.kernels.{name}", None)
    with chosen_kernels("fast"):  # afterwards
        assert tiny(tmp_path / "run", f"--method.type={method}", "--kernels=plain") == 0
        config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
        assert config["kernels"] == "plain"
        with chosen_kernels("fast"):
            assert resume(tmp_path / "run") == 0
            assert not by_kernels()
    assert by_kernels()


def test_a_run_by_plain_torch_differs_by_rounding(tiny, no_conclusion, uninterrupted, tmp_path):
    _, folder, _ = uninterrupted
    with chosen_kernels("fast"):
        assert tiny(tmp_path / "run", "--kernels=plain") == 0
    plain, fast = metrics_lines(tmp_path / "run"), metrics_lines(folder)
    assert len(plain) == len(fast)
    for name in ("td_loss", "adjoint_loss", "bc_loss"):
        found = [[line[name] for line in lines if name in line] for lines in (plain, fast)]
        assert found[0]
        assert found[0] == pytest.approx(found[1], rel=1e-3)
        assert found[0] != found[1]

"""The switch between kernels and plain torch."""

import sys
from pathlib import Path

import pytest
import torch

from vla_trqam import kernel_choice
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import by_kernels, choose_kernels, chosen_kernels
from vla_trqam.networks import tanh_gelu

PRESETS = Path(__file__).parents[2] / "recipes" / "finetune_robomimic.yaml"
KERNELS = ("gelu", "ensemble", "mlp_path")


def test_the_kernels_compute_unless_it_is_said_otherwise() -> None:
    assert by_kernels()
    assert parse_config(FinetuneRobomimicConfig, PRESETS, []).kernels == "fast"


def test_a_choice_for_a_while_ends_even_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), chosen_kernels("plain"):  # noqa: PT012
        assert not by_kernels()
        _ = 1 / 0
    assert by_kernels()


def test_the_plain_way_imports_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        monkeypatch.setitem(sys.modules, f"vla_trqam.kernels.{name}", None)
    z = torch.tensor([0.0, 1.0])
    with pytest.raises(ImportError):
        tanh_gelu(z)
    with chosen_kernels("plain"):
        torch.testing.assert_close(tanh_gelu(z), torch.tensor([0.0, 0.841192]))


def test_another_choice_is_refused_by_its_flag() -> None:
    with pytest.raises(UserError, match=r"^--kernels=quick must be fast or plain$"):
        choose_kernels("quick")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"`kernels`: .* one of: fast, plain$"):
        parse_config(FinetuneRobomimicConfig, PRESETS, ["--kernels=quick"])


def test_kernels_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_THERE", False)
    with pytest.raises(UserError, match=r"^--kernels=fast needs the folder .* --kernels=plain$"):
        choose_kernels("fast")
    choose_kernels("plain")
    monkeypatch.undo()
    choose_kernels("fast")

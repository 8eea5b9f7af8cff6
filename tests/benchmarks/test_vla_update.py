"""The meters against known quantities, and the command on the smallest of models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vla_update
from vla_costs.meter import LiveBytes, Parts, counting_work
from vla_costs.models import Setup
from vla_costs.steps import PARTS, REST

from vla_trqam.errors import UserError

SMALL = ["--batch_size=2", "--num_flow_steps=3", "--cameras=1", "--updates=1", "--warm_up=0"]
SMALL += ["--threads=1"]


def run(folder: Path, *flags: str) -> dict[str, Any]:
    output = folder / "result.json"
    assert vla_update.main([*SMALL, f"--output={output}", *flags]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("tiny"))


# The meters.


def test_an_inner_part_is_not_counted_for_the_outer_one() -> None:
    readings = iter([0.0, 1.0, 3.0, 7.0])
    parts = Parts(lambda: next(readings))
    with parts.of("outer"), parts.of("inner"):
        pass
    assert parts.spent == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_work_is_two_operations_a_product_and_twice_that_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with counting_work() as read:
        product = a @ b
        assert read() == 2 * 3 * 5 * 7
        product.sum().backward()
        assert read() == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_are_those_of_what_is_alive(device: str) -> None:
    def empty(count: int) -> torch.Tensor:
        return torch.empty(count, device=device)

    before = empty(1000)
    with LiveBytes() as live:
        view = before[:10]
        assert (live.now, live.peak) == (0, 0)
        first = empty(100)
        second = first + 1
        same = second.view(10, 10)
        assert live.now == 800
        del first
        assert live.now == 400
        third = empty(50)
        del second, same
        assert live.now == 200
        del view, third
    assert (live.now, live.peak) == (0, 800)


def test_live_bytes_see_what_autograd_keeps() -> None:
    weight = torch.randn(100, requires_grad=True)
    with LiveBytes() as live:
        value = weight.sigmoid()
        total = value.sum()
        del value
        assert live.now == 404  # the sigmoid's output, for its gradient
        total.backward()
        del total
        assert live.now == 400  # the gradient


# The command.


@pytest.mark.slow
def test_parts_and_sides_are_measured(tiny: dict[str, Any]) -> None:
    assert {side: len(found) for side, found in tiny["seconds"].items()} == {
        "trqam": 1,
        "cloning": 1,
    }
    assert set(tiny["part_seconds"]) == {*PARTS, REST}
    assert sum(tiny["part_work"].values()) == tiny["work"]["trqam"]
    for part in PARTS:
        assert tiny["part_seconds"][part] > 0, part
    # The loss finds its fields where the chain was sampled.
    for part in {*PARTS} - {"loss", "optimiser"}:
        assert tiny["part_work"][part] > 0, part
    for part in ("loss", "optimiser", REST):
        assert tiny["part_work"].get(part, 0.0) == 0.0, part
    assert min(tiny["peak_bytes"].values()) > 0


@pytest.mark.slow
def test_without_memory_the_same_work_is_counted(tiny: dict[str, Any], tmp_path: Path) -> None:
    dry = run(tmp_path, "--device=meta")
    assert dry["work"] == tiny["work"]
    assert dry["evaluations"] == tiny["evaluations"]
    assert dry["parameters"] == tiny["parameters"]
    assert dry["model_bytes"] == tiny["model_bytes"]
    assert dry["seconds"] == {}
    for part, work in dry["part_work"].items():
        assert work == tiny["part_work"][part]
    # Logs, and an optimiser whose state is small here, are all that is left out.
    for side, peak in dry["peak_bytes"].items():
        assert peak == pytest.approx(tiny["peak_bytes"][side], rel=0.1)


def evaluations(
    tuned: int, base: int, next_action: int, through_tuned: int, through_base: int
) -> dict[str, int]:
    return {
        "tuned": tuned,
        "base": base,
        "next action": next_action,
        "back through tuned": through_tuned,
        "back through base": through_base,
    }


@pytest.mark.slow
def test_the_chain_shares_what_the_authors_must_ask_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--compare", "--num_flow_steps=4")
    assert found["evaluations"] == {
        "trqam": evaluations(4, 4, 4, 4, 3),
        "authors": evaluations(10, 20, 10, 10, 10),
    }
    assert set(found["seconds"]) == {"trqam", "authors", "cloning"}
    assert 0.0 < found["work"]["trqam"] < 0.5 * found["work"]["authors"]
    printed = capsys.readouterr().out
    assert "TRQAM update: tuned 4, base 4, next action 4, back through tuned 4" in printed
    ratio = found["work"]["trqam"] / found["work"]["authors"]
    (row,) = (line for line in printed.splitlines() if line.startswith("ratio to the authors"))
    assert float(row.split()[-3]) == pytest.approx(ratio, abs=0.006)


@pytest.mark.slow
def test_a_scalar_adjoint_asks_for_no_jacobian(tiny: dict[str, Any], tmp_path: Path) -> None:
    assert tiny["evaluations"]["trqam"] == evaluations(3, 3, 3, 3, 2)
    found = run(tmp_path, "--adjoint=scalar")
    assert found["evaluations"]["trqam"] == evaluations(3, 3, 3, 3, 0)
    assert found["part_work"].get("adjoint", 0.0) == 0.0
    difference = tiny["work"]["trqam"] - found["work"]["trqam"]
    assert difference == tiny["part_work"]["adjoint"]


@pytest.mark.slow
def test_activations_that_are_not_kept_are_computed_again(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path, "--keep_activations=false")
    assert found["evaluations"]["trqam"] == evaluations(6, 5, 3, 3, 2)
    assert found["peak_bytes"]["trqam"] < tiny["peak_bytes"]["trqam"]
    again = ("adjoint", "backward")
    assert all(found["part_work"][part] > tiny["part_work"][part] for part in again)
    assert sum(found["part_work"].values()) == found["work"]["trqam"]


@pytest.mark.slow
def test_a_cached_prefix_costs_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    cached = run(tmp_path, "--cached_prefix")
    assert cached["part_work"].get("prefix", 0.0) == 0.0
    difference = tiny["work"]["trqam"] - cached["work"]["trqam"]
    assert difference == tiny["part_work"]["prefix"]
    assert cached["work"]["cloning"] == tiny["work"]["cloning"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_pi05", "smolvla", "multi_task_dit"])
def test_every_family_is_measured(kind: str, tmp_path: Path) -> None:
    found = run(tmp_path, f"--policy={kind}")
    assert found["work"]["trqam"] > found["work"]["cloning"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy=multi_task_dit", "--size=full"], "--size=full"),
        (["--policy=tiny_pi0", "--size=full"], "one size"),
        (["--policy=smolvla", "--dtype=bfloat16"], "--dtype"),
        (["--policy=smolvla", "--device=meta"], "--device=meta"),
        (["--batch_size=0"], "--batch_size is 0"),
        (["--num_flow_steps=1"], "num_flow_steps is 1"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_exit_code_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vla_update.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err


def test_sizes_and_kinds_are_told_apart() -> None:
    full = Setup("pi0", "full", "meta", "bfloat16", 1, 1, 2, 4)
    assert (full.kind, full.image_size) == ("pi0", 224)
    with pytest.raises(UserError, match="at least 1"):
        Setup("pi0", "full", "meta", "bfloat16", 1, 1, 2, 0)


@pytest.mark.slow
def test_with_next_actions_drawn_before_there_is_one_prefix_an_update(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path, "--one_prefix")
    assert found["evaluations"] == tiny["evaluations"]
    assert found["part_work"]["prefix"] == tiny["part_work"]["prefix"] / 2
    saved = tiny["work"]["trqam"] - found["work"]["trqam"]
    assert saved == pytest.approx(found["part_work"]["prefix"], rel=1e-3)
    cached = run(tmp_path, "--one_prefix", "--cached_prefix")
    assert cached["part_work"].get("prefix", 0.0) == 0.0


@pytest.mark.slow
def test_a_loss_on_some_steps_goes_back_through_these_alone(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path, "--loss_steps=1", "--adjoint=scalar")
    assert found["evaluations"]["trqam"] == evaluations(3, 3, 3, 1, 0) | {
        "tuned": 1,
        "next action": 5,  # and the path's without a gradient
    }
    assert found["work"]["trqam"] < tiny["work"]["trqam"]

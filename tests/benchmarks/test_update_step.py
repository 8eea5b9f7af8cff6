"""The work of an update, counted by hand and as it is executed, and the table."""

import pytest
import update_step
from update_step import AUTHORS_CHAIN, Chain, Size
from vla_costs.meter import counting_work
from vla_trqam.recipes.finetune_robomimic import PRESETS

from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig

SMALL = Size("small", 3, 2, 2, 9, (6,), (5,), 2, False)
ROWS, CHUNK, IN = 9, 4, 3 + 4 + 1


def field_products(chain: Chain) -> dict[str, int]:
    """How often the field's first layer is passed forward, back to its input and to its weights."""
    count = update_step.products(SMALL, chain)
    return {
        "forward": count[1, ROWS, 6, IN],
        "to the input": count[1, ROWS, IN, 6],
        "to the weights": count[1, IN, 6, ROWS],
    }


@pytest.mark.parametrize(
    ("chain", "forward", "to_input", "to_weights"),
    [
        (AUTHORS_CHAIN, 50, 10, 10),
        (Chain("shifted_euler", 10, "scalar"), 40, 0, 10),
        (Chain("posterior", 10), 30, 9, 10),
        (Chain("posterior", 4), 12, 3, 4),
        (Chain("posterior", 4, "scalar"), 12, 0, 4),
    ],
    ids=lambda value: value.label if isinstance(value, Chain) else "",
)
def test_every_evaluation_of_the_field_is_counted(
    chain: Chain, forward: int, to_input: int, to_weights: int
) -> None:
    assert field_products(chain) == {
        "forward": forward,
        "to the input": to_input,
        "to the weights": to_weights,
    }


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("adjoint", ["lean", "scalar"])
def test_a_posterior_update_makes_no_product_twice(steps: int, adjoint: str) -> None:
    chain = Chain("posterior", steps, "lean" if adjoint == "lean" else "scalar")
    update = update_step.make_update(SMALL, chain)
    update()
    with counting_work() as read:
        update()
        executed = read()
    assert executed == expected_work(chain)


def expected_work(chain: Chain) -> float:
    """Of :func:`update_step.products` without what an update need not or does not multiply.

    The gradient to the field's input is one to the chunk's columns, and the critic's head is a sum
    of products, whose gradient to its weights alone is a product.
    """
    counted = update_step.flops(update_step.products(SMALL, chain))
    vjps = field_products(chain)["to the input"]
    not_the_chunk = vjps * 2 * ROWS * 6 * (IN - CHUNK)
    head = 2 * 2 * ROWS * 5 * (3 + 1 + 1)
    return counted - not_the_chunk - head


def test_every_chain_is_measured_beside_the_authors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Chain("posterior", 3)
    monkeypatch.setattr(update_step, "AUTHORS", SMALL)
    monkeypatch.setattr(update_step, "default_preset", lambda: (SMALL, default))
    flags = ["--flow_steps", "4", "3", "--adjoint=lean", "--seconds=0", "--threads=1"]
    assert update_step.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "the default preset's chain: posterior 3"
    chains = [" ".join(line.split()[1:3]) for line in lines[3:]]
    assert chains == ["shifted_euler 10", "posterior 3", "posterior 4"] * 2
    ratios = [float(line.split()[5]) for line in lines[3:]]
    assert ratios[0] == ratios[3] == 1.0
    assert all(0.0 < ratio for ratio in ratios)


def test_a_chain_that_cannot_be_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert update_step.main(["--flow_steps", "1", "--threads=1"]) == 2
    assert "num_flow_steps is 1" in capsys.readouterr().err


def test_the_default_presets_size_is_the_recipes() -> None:
    size, chain = update_step.default_preset()
    assert (size.batch_size, size.hidden_dims, size.ensemble_size) == (64, (128, 128, 128), 4)
    config = parse_config(FinetuneRobomimicConfig, PRESETS, [])
    steps = config.policy.tuned_flow_steps or config.policy.num_flow_steps
    assert chain == Chain(config.method.scheme, steps, config.method.adjoint)

"""A path's evaluations compiled or replayed: the same numbers."""

from collections.abc import Callable

import pytest
import torch
from lerobot_contract import FAMILIES, make_policy, raw_observation
from torch._dynamo.utils import counters
from vla_updates import ROWS, differences, moved

from vla_trqam.methods.trqam import TRQAMConfig
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora"),
    [(kind, number % 2 == 0) for number, kind in enumerate(FAMILIES)],
    ids=[f"{kind}-{('lora', 'full')[number % 2]}" for number, kind in enumerate(FAMILIES)],
)
def test_compiled_updates_are_those_of_before_in_whole_graphs(kind: str, lora: bool) -> None:
    plain = moved(make_policy(kind, lora=lora))
    policy = make_policy(kind, lora=lora)
    policy.evaluations.compile("aot_eager")
    assert differences(moved(policy), plain, 1e-6) == []
    # Tuned and base, each with a gradient and without: none of them broken in two.
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny_pi0", "smolvla"])
def test_machine_code_gives_the_same_to_float_tolerance(kind: str) -> None:
    plain = moved(make_policy(kind, lora=False))
    policy = make_policy(kind, lora=False)
    policy.evaluations.compile()
    assert differences(moved(policy), plain, 2e-4) == []


# Replayed. What records is played here by what computes again: the places where numbers are kept,
# copied to and handed out of are those of CUDA graphs, of which tests/gpu has more.


class Recordings:
    """Counts what is recorded; a replay computes."""

    def __init__(self) -> None:
        self.count = self.replays = 0

    def pool(self) -> object:
        return object()

    def record(self, compute: Callable[[], None], pool: object) -> Callable[[], None]:
        self.count += 1

        def replay() -> None:
            self.replays += 1
            compute()

        return replay


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_replayed_updates_are_those_of_before_and_recorded_once(kind: str, lora: bool) -> None:
    plain = moved(make_policy(kind, lora=lora), updates=3)
    policy, recordings = make_policy(kind, lora=lora), Recordings()
    policy.evaluations.record({ROWS}, recordings)
    first = moved(policy, updates=3)
    assert differences(first, plain, 1e-6) == []
    steps = policy.num_flow_steps
    # Tuned with a gradient at every step, the base at all but the last, both with their backward
    # passes; the base there and the next action without.
    assert recordings.count == 2 * steps + 2 * (steps - 1) + 2
    assert recordings.replays == 3 * (2 * steps + 2 * (steps - 1) + 1 + steps)


@pytest.mark.parametrize(
    "config",
    [
        TRQAMConfig(actor_lr=1e-3, scheme="shifted_euler"),
        TRQAMConfig(actor_lr=1e-3, adjoint="scalar"),
        TRQAMConfig(actor_lr=1e-3, loss_steps=1),
    ],
    ids=["shifted_euler", "scalar", "loss_steps"],
)
def test_replays_serve_every_chain(config: TRQAMConfig) -> None:
    plain = moved(make_policy("smolvla", lora=False), config=config)
    policy = make_policy("smolvla", lora=False)
    policy.evaluations.record({ROWS}, Recordings())
    assert differences(moved(policy, config=config), plain, 1e-6) == []


@pytest.mark.parametrize("rows", [2, 3], ids=["even", "uneven"])
def test_replays_serve_parts_of_a_batch_one_after_the_other(rows: int) -> None:
    plain = moved(make_policy("tiny_pi0", lora=True), rows=rows, num_parts=2)
    policy = make_policy("tiny_pi0", lora=True)
    policy.evaluations.record({rows}, Recordings())
    assert differences(moved(policy, rows=rows, num_parts=2), plain, 1e-6) == []


def test_a_second_pass_through_a_path_adds_its_own_gradient_once() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    policy.evaluations.record({ROWS}, Recordings())
    with torch.no_grad():
        context = policy.encode(raw_observation(ROWS, 0))
    fields = policy.path_fields(context, context)
    fields.evaluate(torch.ones(ROWS, *policy.chunk_shape), None, 0.5, 0.5)
    weights, value = list(policy.trainable_parameters()), fields.tuned().sum()
    first, again = (
        torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True) for _ in range(2)
    )
    assert any(g is not None and bool(g.any()) for g in first)
    for one, other in zip(first, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_gradients_of_a_path_whose_activations_are_gone_are_refused() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    policy.evaluations.record({ROWS}, Recordings())
    with torch.no_grad():
        context = policy.encode(raw_observation(ROWS, 0))
    first = policy.path_fields(context, context)
    x = torch.zeros(ROWS, *policy.chunk_shape)
    first.evaluate(x, None, 0.0, 0.0)
    policy.path_fields(context, context)
    with pytest.raises(RuntimeError, match="another one has been sampled"):
        first.tuned().sum().backward()
    with pytest.raises(RuntimeError, match="another one has been sampled"):
        first.base_pullback(0, x)


def test_weights_that_have_moved_elsewhere_are_recorded_anew() -> None:
    policy, recordings = make_policy("tiny_pi0", lora=True), Recordings()
    policy.evaluations.record({ROWS}, recordings)
    with torch.no_grad():
        context = policy.encode(raw_observation(ROWS, 0))
    x = torch.zeros(ROWS, *policy.chunk_shape)
    for expected in (4, 4, 8):
        policy.path_fields(context, context).evaluate(x, None, 0.0, 0.0)
        assert recordings.count == expected
        if expected == 4 and recordings.replays > 2:
            weight = next(policy.trainable_parameters())
            weight.data = weight.data.clone()


def test_a_sampler_is_replayed_at_as_many_observations_as_are_said() -> None:
    policy, recordings = make_policy("tiny_pi0", lora=True), Recordings()
    with torch.no_grad():
        contexts = [policy.encode(raw_observation(rows, 3)) for rows in (ROWS, ROWS + 1)]
        noise = [torch.randn(rows, *policy.chunk_shape) for rows in (ROWS, ROWS + 1)]
        grid = TimeGrid(policy.num_flow_steps)
        plain = [
            sample_ode(policy.sampled_field(c), x, grid)
            for c, x in zip(contexts, noise, strict=True)
        ]
    policy.evaluations.record({ROWS}, recordings)
    with torch.no_grad():
        for context, x, expected in zip(contexts, noise, plain, strict=True):
            found = sample_ode(policy.sampled_field(context), x, grid)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert recordings.replays == policy.num_flow_steps

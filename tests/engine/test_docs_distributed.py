"""The code of docs/distributed.md is run as it stands there."""

from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from docs_pages import code_of
from toy_learners import make_batch, make_off_policy


@pytest.fixture(autouse=True)
def own_accelerator():
    """It is one a process, and this one computes in bfloat16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_pages_update_runs_in_one_process() -> None:
    (code,) = code_of("distributed.md")
    other = make_off_policy()
    names = {"policy": other.policy, "critic": other.critic, "config": other.config}
    names |= {"seed": 0, "batch_size": 8}
    names["sampler"] = SimpleNamespace(sample=lambda rows, generator: make_batch(rows))
    exec(compile(code, "distributed.md", "exec"), names)
    assert names["metrics"]["td_loss"] > 0.0

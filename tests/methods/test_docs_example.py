"""The method of docs/add_a_method.md is one: what stands there is run."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from test_bandit import SHAPE, pretrained, reward, transitions
from vla_trqam.adapters.mlp import MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.errors import UserError
from vla_trqam.methods import registry
from vla_trqam.methods.base import GeneratorNoise

PAGE = Path(__file__).parents[2] / "docs/add_a_method.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's file as a module, and in the registry."""
    code, entry = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    module = types.ModuleType("emaq_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    line = next(line for line in entry.splitlines() if "emaq" in line)
    name, made = eval(
        f"({line.strip().rstrip(',').replace(':', ',', 1)})",
        {"_entry": registry._entry, **module.__dict__},
    )
    monkeypatch.setitem(registry.METHODS, name, made)
    return module


def test_the_pages_method_learns_to_choose(example: types.ModuleType) -> None:
    policy = MLPFlowPolicy(SHAPE)
    policy.load_state_dict(pretrained())
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(1, 2, (48, 48), 2), target_rate=0.02)
    config = example.EMaQConfig(num_samples=16, critic_lr=3e-3)
    method = registry.make_method(policy, critic, config)
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        method.update(transitions(generator), generator)
    context = policy.encode(torch.zeros(500, 1))

    def earns(which: str) -> float:
        noise = GeneratorNoise(torch.Generator().manual_seed(9), 500, torch.device("cpu"))
        action = method.actor(which).chunk(context, noise)  # type: ignore[arg-type]
        return float(reward(action.clamp(-1, 1)).mean())

    assert earns("base") < -1.0
    assert earns("tuned") > -0.4


def test_micro_batches_make_the_same_update_of_it(example: types.ModuleType) -> None:
    found = []
    for parts in (1, 4):
        torch.manual_seed(1)
        policy = MLPFlowPolicy(SHAPE)
        critic = Critic(CriticEnsemble(1, 2, (48, 48), 2))
        method = registry.make_method(policy, critic, example.EMaQConfig())
        batch = transitions(torch.Generator().manual_seed(3))
        batch.terminated[:] = False
        method.update(batch, torch.Generator().manual_seed(4), num_parts=parts)
        found.append(method.metrics()["target_mean"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_pages_knobs_are_checked(example: types.ModuleType) -> None:
    with pytest.raises(UserError, match="num_samples is 0"):
        example.EMaQConfig(num_samples=0)

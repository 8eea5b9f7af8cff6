"""The policy of docs/add_a_policy.md is one: what stands there is run."""

import re
import sys
from types import ModuleType

import pytest
from docs_pages import code_of

CLASS, TESTS, TUNED = code_of("add_a_policy.md")
page = ModuleType("mixer_policy_of_the_docs")
sys.modules[page.__name__] = page  # dataclasses look there
exec(CLASS, vars(page))
exec(TESTS, suite := {**vars(page), "__name__": __name__})
TestMixerPolicy = suite["TestMixerPolicy"]


@pytest.mark.slow
def test_the_page_tunes_it(capsys: pytest.CaptureFixture[str]) -> None:
    exec(TUNED, dict(vars(page)))
    base, tuned, kl, lam = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    assert base < -1.0
    assert tuned > -0.3
    assert 0.5 < kl < 3.0  # the budget is 2
    assert lam > 0

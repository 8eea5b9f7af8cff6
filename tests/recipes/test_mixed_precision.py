"""A run that is launched in bfloat16 computes in it wherever its networks are asked."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from vla_runs import files, forgetful_pool, no_conclusion, tiny, without_simulator
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.methods.base import FlowActor

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `accelerate launch --mixed_precision=bf16` starts it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Whether autocast was on, where actors acted and where what is kept was encoded."""
    found: dict[str, set[bool]] = {"acted": set(), "kept": set()}
    chunk, packed, update = FlowActor.chunk, LeRobotFlowPolicy.packed, FeatureCache.update

    def acted(self, context, noise):
        found["acted"].add(torch.is_autocast_enabled("cpu"))
        return chunk(self, context, noise)

    def kept(self, **named):
        def encoded(policy, observation):
            found["kept"].add(torch.is_autocast_enabled("cpu"))
            return packed(policy, observation)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LeRobotFlowPolicy, "packed", encoded)
            return update(self, **named)

    monkeypatch.setattr(FlowActor, "chunk", acted)
    monkeypatch.setattr(FeatureCache, "update", kept)
    return found


def test_rollouts_next_actions_and_the_cache_are_in_bfloat16(
    launched, watched, tiny, no_conclusion, tmp_path
):
    assert tiny(tmp_path / "run") == 0
    assert watched == {"acted": {True}, "kept": {True}}


def test_without_it_all_are_in_float32(watched, tiny, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run") == 0
    assert watched == {"acted": {False}, "kept": {False}}

"""`--log_with` in the recipe for LeRobot's policies."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vla_runs import files, forgetful_pool, no_conclusion, tiny, without_simulator

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]  # fixtures

pytestmark = pytest.mark.slow


def test_a_run_with_a_service_for_curves_has_its_lines_there(tiny, no_conclusion, tmp_path):
    flags = ["--steps=2", "--online.steps=0", "--base_episodes=0", "--critic.warmup_steps=0"]
    assert tiny(tmp_path / "run", *flags, "--log_with=tensorboard") == 0
    found = EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("offline/td_loss")] == [1, 2]

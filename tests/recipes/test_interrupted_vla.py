"""The recipes for LeRobot's policies on a toy task: a stop, however it comes, costs nothing."""

import json
import shutil
import signal
import sys
from collections.abc import Callable

import numpy as np
import pytest
from toy_deaths import (
    dies_at_call,
    dies_at_update,
    diverges_at_update,
    signalled_at_update,
)
from toy_files import differences
from toy_images import NUM_DEMOS, ImageToyPool, images_state
from toy_task import Killed
from vla_runs import (
    files,
    forgetful_pool,
    full,
    killed,
    main,
    no_conclusion,
    resume,
    tiny,
    whole,
    without_conclusion,
    without_simulator,
)

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.replay import Replay
from vla_trqam.engine.cached import Cached, CriticOnly
from vla_trqam.engine.folder import checkpoints
from vla_trqam.engine.folder.manifest import write_manifest

__all__ = [  # fixtures
    "files",
    "forgetful_pool",
    "full",
    "no_conclusion",
    "tiny",
    "whole",
    "without_simulator",
]
pytestmark = pytest.mark.slow
ROLLBACK = "--on_divergence=rollback"


@pytest.mark.parametrize(
    ("learner", "number", "checkpoint"),
    [
        (CriticOnly, 1, "critic_000001"),
        (Cached, 3, "000003"),
        (Cached, 6, "000006"),
    ],
)
def test_a_stop_saves_at_once_and_goes_on_to_the_same_bits(
    learner, number, checkpoint, tiny, no_conclusion, whole, tmp_path, capfd
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, learner, number, signal.SIGINT)
        assert tiny(folder) == 130
    assert (folder / "checkpoints/last").resolve().name == checkpoint
    assert f"--resume=true --output_dir={folder}" in capfd.readouterr().err
    assert resume(folder) == 0
    assert differences(images_state(folder), without_conclusion(whole.state)) == []


def at_round(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(_: pytest.MonkeyPatch) -> None:
        def kill(found: int) -> None:
            if found == number:
                raise Killed

        ImageToyPool.before_run = kill

    return prepare


KILLS = {
    "before the base's episodes": at_round(0),
    "before the second online round": at_round(5),
    "between an episode and its features": lambda p: dies_at_call(p, FeatureCache, "update", 4),
    "in a critic update": lambda p: dies_at_update(p, CriticOnly, 3),
    "in an online update": lambda p: dies_at_update(p, Cached, 7),
    "while the first checkpoint is written": lambda p: dies_at_call(
        p, checkpoints, "_write_json", 1
    ),
    "before a checkpoint is pointed at": lambda p: dies_at_call(p, checkpoints, "_point", 4),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(when, tiny, no_conclusion, whole, tmp_path):
    with killed(KILLS[when]):
        tiny(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(images_state(tmp_path / "run"), without_conclusion(whole.state)) == []


def test_a_rollback_reaches_what_the_resume_of_a_stopped_run_does(
    tiny, no_conclusion, tmp_path, monkeypatch, capsys
):
    """In an online update: back before its round, whose episodes and features are made anew."""
    # Counted by the critic's, which moves most often: 3 in the warm-up and 3 for each other update.
    diverges_at_update(monkeypatch, Cached, 3 + 3 * 5)
    assert tiny(tmp_path / "rolled", ROLLBACK) == 0
    assert capsys.readouterr().err.count("with 0.5 of the step sizes") == 1
    assert tiny(tmp_path / "stopped") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert " in online update 3; the last good checkpoint is " in said
    assert main("--resume=true", f"--output_dir={tmp_path / 'stopped'}", ROLLBACK) == 0
    one, other = (images_state(tmp_path / name) for name in ("rolled", "stopped"))
    assert differences(one, other) == []
    assert json.loads(one["algorithm/scalars.json"])["step_factor"] == 0.5


def test_full_fine_tuning_resumes_to_the_same_bits(tiny, no_conclusion, full, tmp_path):
    with killed(lambda patch: dies_at_update(patch, Cached, 5)):
        tiny(tmp_path / "run", "--peft.method=full")
    assert resume(tmp_path / "run") == 0
    assert differences(images_state(tmp_path / "run"), without_conclusion(full.state)) == []


def test_a_run_whose_rollouts_left_the_statistics_is_gone_on_with(tiny, tmp_path):
    with killed(lambda patch: dies_at_update(patch, Cached, 6)):
        tiny(tmp_path / "run")
    replay = Replay.open(tmp_path / "run/replay")
    first = int(replay.episodes().first_observation[NUM_DEMOS])
    states = np.load(tmp_path / "run/replay/observations.npy", mmap_mode="r+")
    assert len(replay.observations) > 1.5 * first, "too few rollouts to be noticed"
    states[first : len(replay.observations)] *= 1000.0
    states.flush()
    assert resume(tmp_path / "run") == 0


def test_a_run_in_another_precision_is_not_gone_on_with(tiny, tmp_path, capsys):
    with killed(lambda patch: dies_at_update(patch, Cached, 5)):
        tiny(tmp_path / "run")
    path = tmp_path / "run/checkpoints/last/training_state/position.json"
    position = json.loads(path.read_text())
    path.write_text(json.dumps(position | {"precision": "bf16"}))
    write_manifest(path.parents[1])
    assert resume(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "is of a run with mixed_precision bf16, this one is launched with no" in said
    path.write_text(json.dumps(position))
    write_manifest(path.parents[1])
    assert resume(tmp_path / "run") == 0


def test_the_report_of_a_resumed_run_shows_the_command_that_began_it(
    tiny, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["finetune_pi0.py", "--begun=here"])
    with killed(lambda patch: dies_at_update(patch, CriticOnly, 1)):
        tiny(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["finetune_pi0.py", "--resume=true"])
    # First anew, for there is no checkpoint yet, and then on.
    with killed(lambda patch: dies_at_update(patch, Cached, 6)):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    report = (tmp_path / "run/report.md").read_text()
    assert "accelerate launch -q finetune_pi0.py --begun=here" in report
    assert "finetune_pi0.py --resume=true" not in report
    assert differences(images_state(tmp_path / "run"), whole.state) == []


def test_a_resumed_run_does_not_need_the_former_one(tiny, no_conclusion, whole, tmp_path):
    given = tmp_path / "given"
    shutil.copytree((whole.folder / "checkpoints/last").resolve(), given)
    flags = (f"--critic.path={given}", "--critic.warmup_steps=0")
    assert tiny(tmp_path / "whole", *flags) == 0
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        tiny(tmp_path / "killed", *flags)
    shutil.rmtree(given)
    assert resume(tmp_path / "killed") == 0
    one, other = (images_state(tmp_path / name) for name in ("killed", "whole"))
    assert differences(one, other) == []

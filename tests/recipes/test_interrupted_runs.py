"""The recipe on the toy task: a stop, whenever and however it comes, costs nothing."""

import os
import shutil
import signal
import time

import pytest
from toy_deaths import dies_at_call, dies_at_update, signalled_at_update
from toy_files import differences, final_state
from toy_task import Killed, ToyPool
from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.engine.cached import CriticOnly
from vla_trqam.engine.folder import checkpoints
from vla_trqam.jobs import states
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.trqam import TRQAM

WARM = ("--critic.warmup_steps=3", "--save_freq=2")


@pytest.mark.parametrize(
    ("learner", "number"),
    [
        (BehaviourCloning, 1),
        (BehaviourCloning, 4),
        (BehaviourCloning, 6),
        (TRQAM, 1),
        (TRQAM, 3),
        (TRQAM, 6),
        (TRQAM, 7),
        (TRQAM, 11),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    learner, number, tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, learner, number)
        with pytest.raises(Killed):
            tiny(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


@pytest.mark.parametrize("call", range(8))
def test_a_run_killed_in_a_rollout_or_evaluation_goes_on_to_the_same_bits(
    call, tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    def kill(number):
        if number == call:
            ToyPool.before_run = None
            raise Killed

    assert len(uninterrupted[2]) == 8
    ToyPool.before_run = kill
    with pytest.raises(Killed):
        tiny(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("step", ["_write_json", "_point"])
def test_a_run_killed_while_it_saves_goes_on_to_the_same_bits(
    step, number, tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        dies_at_call(patch, checkpoints, step, number)
        with pytest.raises(Killed):
            tiny(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


def test_a_run_killed_between_pretraining_and_its_base_goes_on_to_the_same_bits(
    tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLPFlowPolicy, "reset_base", raise_killed)
        with pytest.raises(Killed):
            tiny(tmp_path / "run")
    assert not (tmp_path / "run" / "base_policy").exists()
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


def raise_killed(*_):
    raise Killed


def test_a_run_killed_time_and_again_goes_on_to_the_same_bits(
    tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    def attempt(run):
        with pytest.MonkeyPatch.context() as patch:
            dies_at_update(patch, TRQAM, 5)
            try:
                return run()
            except Killed:
                return None

    outcome = attempt(lambda: tiny(tmp_path / "run"))
    attempts = 1
    while outcome is None and attempts < 9:
        outcome, attempts = attempt(lambda: resume(tmp_path / "run")), attempts + 1
    assert outcome == 0
    assert attempts > 2
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("learner", "number", "checkpoint"),
    [
        (BehaviourCloning, 3, "pretrain_000003"),
        (BehaviourCloning, 6, "pretrain_000006"),
        (TRQAM, 3, "000003"),
        (TRQAM, 11, "000011"),
        (TRQAM, 12, "000012"),
    ],
)
def test_a_stop_saves_at_once_and_goes_on_to_the_same_bits(
    which, learner, number, checkpoint, tiny, resume, no_conclusion, uninterrupted, tmp_path, capfd
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, learner, number, which)
        assert tiny(folder) == 130
    assert (folder / "checkpoints" / "last").resolve().name == checkpoint
    errors = capfd.readouterr().err
    assert "stopping after this update" in errors
    *_, last = errors.splitlines()
    assert last.startswith("stopped at ")
    assert f"--resume=true --output_dir={folder}" in last
    assert no_conclusion == []
    assert resume(folder) == 0
    assert differences(final_state(folder), uninterrupted[0]) == []


def test_a_second_ctrl_c_stops_at_once(tiny, no_conclusion, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRQAM, "update", interrupt_twice)
        assert tiny(tmp_path / "run") == 130
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "pretrain_000006"
    assert "go on with: " in capfd.readouterr().err


def interrupt_twice(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_ctrl_c_before_the_first_checkpoint_says_so(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_robomimic, "read_dataset", interrupt)
    assert tiny(tmp_path / "run") == 130
    said = "stopped before the first checkpoint: nothing is kept, begin again\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumes_to_its_conclusion(tiny, resume, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run") == 0
    before = final_state(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), before) == []
    assert len(no_conclusion) == 2


def test_the_whole_run_with_its_report_resumes_to_the_same_evaluation(tiny, resume, tmp_path):
    assert tiny(tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 10)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed")
    assert resume(tmp_path / "killed") == 0
    state = final_state(tmp_path / "killed")
    assert "evaluation" in state
    assert differences(state, final_state(tmp_path / "whole")) == []
    assert (tmp_path / "killed" / "report.md").is_file()


@pytest.mark.parametrize("update", [0, 1, 5])
def test_a_run_from_a_given_policy_goes_on_without_it(
    update, tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    given = tmp_path / "given"
    shutil.copytree(uninterrupted[1] / "base_policy", given)
    assert tiny(tmp_path / "whole", f"--policy.path={given}") == 0
    with pytest.MonkeyPatch.context() as patch:
        if update:
            dies_at_update(patch, TRQAM, update)
        else:
            patch.setattr(states, "fill", raise_killed)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", f"--policy.path={given}")
    shutil.rmtree(given)
    assert resume(tmp_path / "killed") == 0
    killed, whole = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert differences(killed, whole) == []


@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_run_killed_while_its_critic_warms_up_goes_on_to_the_same_bits(
    update, tiny, resume, no_conclusion, tmp_path
):
    assert tiny(tmp_path / "whole", *WARM) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, CriticOnly, update)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *WARM)
    assert resume(tmp_path / "killed") == 0
    whole, killed = (final_state(tmp_path / name) for name in ("whole", "killed"))
    assert differences(killed, whole) == []

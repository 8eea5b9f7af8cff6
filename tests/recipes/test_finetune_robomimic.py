"""The recipe as a whole on the toy task: what it leaves, and that a stop costs nothing."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_files import differences, final_state, metrics_lines
from toy_settings import TINY
from toy_task import Killed, ToyPool
from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.training import checkpoints, run_folder
from vla_trqam.training.acting import chunk_policy
from vla_trqam.training.finetuning import EVALUATION_NOISE
from vla_trqam.training.learners import BehaviourCloning, CriticWarmup, OffPolicy


def dies_at_update(monkeypatch, learner, number, death=Killed):
    """The process ends in the middle of the n-th update of this kind."""
    update, count = learner.update, 0

    def mortal(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            raise death
        update(self, *arguments)

    monkeypatch.setattr(learner, "update", mortal)


def signalled_at_update(monkeypatch, learner, number, which):
    update, count = learner.update, 0

    def signalled(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), which)
        update(self, *arguments)

    monkeypatch.setattr(learner, "update", signalled)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_file):
    """A whole run without conclusion."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_robomimic, "RolloutPool", ToyPool)
        patch.setattr(finetune_robomimic, "conclude", lambda *a, **k: None)
        ToyPool.rounds, ToyPool.before_run = [], None
        arguments = [f"--dataset.path={toy_file}", *TINY, f"--output_dir={folder}"]
        assert finetune_robomimic.main(arguments) == 0
        return final_state(folder), folder, list(ToyPool.rounds)


def test_the_first_evaluation_is_the_bases(uninterrupted):
    _, folder, rounds = uninterrupted
    first = next(line for line in metrics_lines(folder) if line["phase"] == "eval")
    base = MLPFlowPolicy.from_pretrained(folder / "base_policy")
    pool = ToyPool({}, max_episode_steps=10)
    episodes = pool.run(chunk_policy(base, EVALUATION_NOISE), rounds[0])
    assert first["step"] == 0
    assert first["success_rate"] == np.mean([e.success for e in episodes])


def test_every_phase_evaluation_and_rollout_is_logged_in_order(uninterrupted):
    _, folder, _ = uninterrupted
    found = [(line["phase"], line["step"]) for line in metrics_lines(folder)]
    assert found == [
        *[("pretrain", n) for n in (2, 4, 6)],
        ("eval", 0),
        *[("offline", 0)] * 2,  # the base's episodes
        ("offline", 2),
        ("eval", 3),
        ("offline", 4),
        ("offline", 6),
        ("eval", 6),
        *[("online", 6)] * 2,
        ("online", 8),
        ("eval", 9),
        *[("online", 9)] * 2,
        ("online", 10),
        ("online", 12),
        ("eval", 12),
    ]


@pytest.mark.parametrize(
    ("learner", "number"),
    [
        (BehaviourCloning, 1),
        (BehaviourCloning, 4),
        (BehaviourCloning, 6),
        (OffPolicy, 1),
        (OffPolicy, 3),
        (OffPolicy, 6),
        (OffPolicy, 7),
        (OffPolicy, 11),
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


def dies_at_call(patch, owner, name, number):
    """The process ends at the beginning of the n-th call, counted from 0."""
    function, count = getattr(owner, name), 0

    def mortal(*arguments):
        nonlocal count
        count += 1
        if count == number + 1:
            raise Killed
        return function(*arguments)

    patch.setattr(owner, name, mortal)


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
            dies_at_update(patch, OffPolicy, 5)
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
        (OffPolicy, 3, "000003"),
        (OffPolicy, 11, "000011"),
        (OffPolicy, 12, "000012"),
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
        patch.setattr(OffPolicy, "update", interrupt_twice)
        assert tiny(tmp_path / "run") == 130
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "pretrain_000006"
    assert "go on with: " in capfd.readouterr().err


def interrupt_twice(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_ctrl_c_before_anything_is_written_says_so(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_robomimic, "read_dataset", interrupt)
    assert tiny(tmp_path / "run") == 130
    assert capsys.readouterr().err == "stopped before anything was written\n"


def test_a_finished_run_resumes_to_its_conclusion(tiny, resume, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run") == 0
    before = final_state(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), before) == []
    assert len(no_conclusion) == 2


def test_the_wall_clock_of_all_parts_adds_up(tiny, resume, no_conclusion, tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, OffPolicy, 8, signal.SIGINT)
        assert tiny(folder) == 130
    position = json.loads((folder / "checkpoints/last/training_state/position.json").read_text())
    assert resume(folder) == 0
    clock = no_conclusion[0]["run"].wall_clock
    assert position["wall_clock"].keys() == clock.keys()
    assert clock["pretrain"] == position["wall_clock"]["pretrain"]
    assert clock["online"] > position["wall_clock"]["online"]
    assert clock["evaluations"] > position["wall_clock"]["evaluations"]


def test_no_initial_state_serves_both_training_and_evaluation(tiny, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run") == 0
    evaluations = {tuple(r) for i, r in enumerate(ToyPool.rounds) if i in {0, 2, 3, 5, 7}}
    assert len(evaluations) == 1, "every evaluation during training is on the same states"
    training = [seed for r in ToyPool.rounds if tuple(r) not in evaluations for seed in r]
    final = no_conclusion[0]["evaluation_seeds"]
    assert len(training) == len(set(training)) == 6
    assert len({*training, *next(iter(evaluations)), *final}) == 6 + 2 + 2


def test_the_whole_run_with_its_report_resumes_to_the_same_evaluation(tiny, resume, tmp_path):
    assert tiny(tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, OffPolicy, 10)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed")
    assert resume(tmp_path / "killed") == 0
    state = final_state(tmp_path / "killed")
    assert "evaluation" in state
    assert differences(state, final_state(tmp_path / "whole")) == []
    assert (tmp_path / "killed" / "report.md").is_file()


def test_online_and_offline_data_can_be_mixed_in_a_fixed_share(
    tiny, resume, no_conclusion, tmp_path
):
    flags = ["--online.fraction=0.5"]
    assert tiny(tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, OffPolicy, 12)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    assert resume(tmp_path / "killed") == 0
    killed, whole = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert differences(killed, whole) == []


def test_a_given_policy_is_the_base_and_is_not_pretrained(
    tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    given = uninterrupted[1] / "base_policy"
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, OffPolicy, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "run", f"--policy.path={given}")
    assert resume(tmp_path / "run") == 0
    assert all(line["phase"] != "pretrain" for line in metrics_lines(tmp_path / "run"))
    expected = MLPFlowPolicy.from_pretrained(given).state_dict()
    for key, value in no_conclusion[0]["base"].state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("update", [0, 1, 5])
def test_a_run_from_a_given_policy_goes_on_without_it(
    update, tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    given = tmp_path / "given"
    shutil.copytree(uninterrupted[1] / "base_policy", given)
    assert tiny(tmp_path / "whole", f"--policy.path={given}") == 0
    with pytest.MonkeyPatch.context() as patch:
        if update:
            dies_at_update(patch, OffPolicy, update)
        else:
            patch.setattr(run_folder, "fill_replay", raise_killed)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", f"--policy.path={given}")
    shutil.rmtree(given)
    assert resume(tmp_path / "killed") == 0
    killed, whole = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert differences(killed, whole) == []


def test_the_reported_base_is_the_pretrained_one_while_the_base_trains(
    tiny, no_conclusion, uninterrupted, tmp_path
):
    flags = ["--trqam.train_base=true", "--trqam.base_ema_rate=0.5"]
    assert tiny(tmp_path / "run", *flags) == 0
    run, base = no_conclusion[0]["run"], no_conclusion[0]["base"]
    pretrained = MLPFlowPolicy.from_pretrained(uninterrupted[1] / "base_policy")
    for mine, theirs in zip(base.tuned.parameters(), pretrained.tuned.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    moved = zip(run.policy.base.parameters(), pretrained.base.parameters(), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in moved)


def test_online_only_still_begins_with_an_evaluation_of_the_base(tiny, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run", "--offline.steps=0") == 0
    found = [(line["phase"], line["step"]) for line in metrics_lines(tmp_path / "run")]
    assert found[3] == ("eval", 0)


def test_qam_keeps_lambda_at_one(tiny, no_conclusion, tmp_path):
    flags = ["--method.name=qam", "--method.inverse_temperature=2.5"]
    assert tiny(tmp_path / "run", *flags) == 0
    lams = [line["lam"] for line in metrics_lines(tmp_path / "run") if "lam" in line]
    assert lams == [1.0] * 6
    assert no_conclusion[0]["title"].startswith("QAM")


def test_a_run_is_a_function_of_its_seed(tiny, no_conclusion, uninterrupted, tmp_path):
    assert tiny(tmp_path / "same") == 0
    assert tiny(tmp_path / "other", "--seed=1") == 0
    assert differences(final_state(tmp_path / "same"), uninterrupted[0]) == []
    assert "algorithm/networks.safetensors" in differences(
        final_state(tmp_path / "other"), uninterrupted[0]
    )


def test_the_saved_settings_begin_the_same_run_elsewhere(
    tiny, no_conclusion, uninterrupted, toy_pool, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        # A first attempt without a checkpoint is begun anew by --resume: config.yaml is rewritten.
        dies_at_update(patch, BehaviourCloning, 2)
        with pytest.raises(Killed):
            tiny(tmp_path / "run")
    arguments = ["--resume=true", f"--output_dir={tmp_path / 'run'}"]
    assert finetune_robomimic.main(arguments) == 0
    config = tmp_path / "run" / "config.yaml"
    elsewhere = [f"--config_path={config}", f"--output_dir={tmp_path / 'again'}"]
    assert finetune_robomimic.main(elsewhere) == 0
    assert differences(final_state(tmp_path / "again"), uninterrupted[0]) == []


WARM = ("--offline.critic_steps=3", "--save_freq=2")


def test_the_critic_warms_up_on_the_bases_episodes_before_the_policy_moves(
    tiny, no_conclusion, tmp_path
):
    folder = tmp_path / "run"
    assert tiny(folder, *WARM) == 0
    found = [(line["phase"], line["step"]) for line in metrics_lines(folder)]
    assert found[3:9] == [
        *[("critic", 0)] * 2,  # the base's episodes
        ("critic", 2),
        ("critic", 3),
        ("eval", 0),
        ("offline", 2),
    ]
    warmed = MLPFlowPolicy.from_pretrained(folder / "checkpoints/critic_000003/pretrained_model")
    base = MLPFlowPolicy.from_pretrained(folder / "base_policy")
    assert all(map(torch.equal, warmed.tuned.parameters(), base.tuned.parameters()))
    first, second = (
        safetensors.torch.load_file(folder / f"checkpoints/{name}/algorithm/networks.safetensors")
        for name in ("critic_000002", "critic_000003")
    )
    moved = {key.split(".")[0] for key in first if not torch.equal(first[key], second[key])}
    assert moved == {"critic"}


@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_run_killed_while_its_critic_warms_up_goes_on_to_the_same_bits(
    update, tiny, resume, no_conclusion, tmp_path
):
    assert tiny(tmp_path / "whole", *WARM) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, CriticWarmup, update)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *WARM)
    assert resume(tmp_path / "killed") == 0
    whole, killed = (final_state(tmp_path / name) for name in ("whole", "killed"))
    assert differences(killed, whole) == []

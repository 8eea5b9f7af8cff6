"""The recipe as a whole on the toy task: what it leaves."""

import json
import signal

import numpy as np
import pytest
import torch
from toy_deaths import dies_at_update, signalled_at_update
from toy_files import differences, final_state, metrics_lines
from toy_task import Killed, ToyPool, toy_family
from vla_trqam.adapters.mlp import MLPFlowPolicy
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.methods.base import FlowActor
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.trqam import TRQAM

WARM = ("--critic.warmup_steps=3", "--save_freq=2")


def test_the_first_evaluation_is_the_bases(uninterrupted):
    _, folder, rounds = uninterrupted
    first = next(line for line in metrics_lines(folder) if line["phase"] == "eval")
    base = MLPFlowPolicy.from_pretrained(folder / "base_policy")
    pool = ToyPool(toy_family())
    episodes = pool.run(chunk_policy(base, FlowActor(base), EVALUATION_NOISE), rounds[0])
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


def test_the_wall_clock_of_all_parts_adds_up(tiny, resume, no_conclusion, tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, TRQAM, 8, signal.SIGINT)
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


def test_online_and_offline_data_can_be_mixed_in_a_fixed_share(
    tiny, resume, no_conclusion, tmp_path
):
    flags = ["--online.fraction=0.5"]
    assert tiny(tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 12)
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
        dies_at_update(patch, TRQAM, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "run", f"--policy.path={given}")
    assert resume(tmp_path / "run") == 0
    assert all(line["phase"] != "pretrain" for line in metrics_lines(tmp_path / "run"))
    expected = MLPFlowPolicy.from_pretrained(given).state_dict()
    for key, value in no_conclusion[0]["base"].state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_the_reported_base_is_the_pretrained_one_while_the_base_trains(
    tiny, no_conclusion, uninterrupted, tmp_path
):
    flags = ["--method.train_base=true", "--method.base_ema_rate=0.5"]
    assert tiny(tmp_path / "run", *flags) == 0
    run, base = no_conclusion[0]["run"], no_conclusion[0]["base"]
    pretrained = MLPFlowPolicy.from_pretrained(uninterrupted[1] / "base_policy")
    for mine, theirs in zip(base.tuned.parameters(), pretrained.tuned.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    moved = zip(run.policy.base.parameters(), pretrained.base.parameters(), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in moved)


def test_online_only_still_begins_with_an_evaluation_of_the_base(tiny, no_conclusion, tmp_path):
    assert tiny(tmp_path / "run", "--steps=0") == 0
    found = [(line["phase"], line["step"]) for line in metrics_lines(tmp_path / "run")]
    assert found[3] == ("eval", 0)


def test_qam_keeps_lambda_at_one(tiny, no_conclusion, tmp_path):
    flags = ["--method.type=qam", "--method.inverse_temperature=2.5"]
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
    assert not (folder / "checkpoints/critic_000002").exists(), "an older one is of no use"

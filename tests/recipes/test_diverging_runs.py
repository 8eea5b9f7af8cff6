"""The recipe on the toy task with a loss of NaN: a sentence, or a rollback."""

import json

import pytest
from toy_deaths import diverges_at_update
from toy_files import differences, final_state, metrics_lines
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.methods.trqam import TRQAM

ROLLBACK = "--on_divergence=rollback"


def test_a_run_stops_with_a_sentence_that_says_how_to_go_on(
    tiny, no_conclusion, tmp_path, capsys, monkeypatch
):
    diverges_at_update(monkeypatch, TRQAM, 5)
    assert tiny(tmp_path / "run") == 1
    *_, last = capsys.readouterr().err.splitlines()
    checkpoint = tmp_path / "run/checkpoints/000004"
    assert last.startswith("error: training has diverged: the loss is nan at lambda ")
    assert f" in offline update 6; the last good checkpoint is {checkpoint}: go on from" in last
    assert last.endswith(f"--resume=true --output_dir={tmp_path / 'run'} {ROLLBACK}")
    assert no_conclusion == []
    told = (tmp_path / "run" / DIVERGED_NAME).read_text()
    assert told.startswith("training has diverged: the loss is nan")
    assert "update 6" in told


@pytest.mark.parametrize(
    ("update", "flags"),
    [
        (8, []),
        (0, []),  # the last checkpoint is the pretraining's
        (2, ["--method.train_base=true", "--method.lam_init=2.0"]),
    ],
)
def test_a_rollback_reaches_what_the_resume_of_a_stopped_run_does(
    update, flags, tiny, toy_pool, no_conclusion, tmp_path, monkeypatch, capsys
):
    diverges_at_update(monkeypatch, TRQAM, update)
    assert tiny(tmp_path / "rolled", ROLLBACK, *flags) == 0
    assert capsys.readouterr().err.count("with 0.5 of the step sizes") == 1
    assert tiny(tmp_path / "stopped", *flags) == 1
    assert (tmp_path / "stopped" / DIVERGED_NAME).is_file()
    resumed = ["--resume=true", f"--output_dir={tmp_path / 'stopped'}", ROLLBACK]
    assert finetune_robomimic.main(resumed) == 0
    assert not (tmp_path / "stopped" / DIVERGED_NAME).exists()
    rolled, stopped = final_state(tmp_path / "rolled"), final_state(tmp_path / "stopped")
    assert differences(rolled, stopped) == []
    scalars = json.loads(rolled["algorithm/scalars.json"])
    assert scalars["step_factor"] == 0.5
    logged = [line for line in metrics_lines(tmp_path / "rolled") if "td_loss" in line]
    assert logged[-1]["step_factor"] == 0.5


def test_without_a_checkpoint_the_sentence_says_what_to_change(
    tiny, uninterrupted, no_conclusion, tmp_path, capsys, monkeypatch
):
    diverges_at_update(monkeypatch, TRQAM, 0)
    given = uninterrupted[1] / "base_policy"
    for choice in ("stop", "rollback"):
        flags = (f"--on_divergence={choice}", f"--policy.path={given}")
        assert tiny(tmp_path / choice, *flags) == 1
        *_, last = capsys.readouterr().err.splitlines()
        assert last.endswith(
            "in offline update 1; there is no checkpoint to go back to: begin again with a smaller "
            "--method.actor_lr, --method.critic_lr or --method.kl_budget"
        )


def test_a_run_that_never_diverges_is_the_same_with_a_rollback_in_hand(
    tiny, no_conclusion, uninterrupted, tmp_path
):
    assert tiny(tmp_path / "run", ROLLBACK) == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


@pytest.mark.parametrize("flag", ["--on_divergence=ignore", "--eval.chunk_deadline=0"])
def test_what_cannot_be_chosen_is_refused(flag, tiny, tmp_path, capsys):
    assert tiny(tmp_path / "run", flag) == 2
    assert flag.split("=")[0].removeprefix("--").split(".")[-1] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

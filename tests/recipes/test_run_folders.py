"""The recipe on the toy task: what a failure leaves, and how a run is gone on with otherwise."""

import shlex
import shutil
import sys

import h5py
import pytest
from toy_deaths import dies_at_update
from toy_files import differences, final_state, metrics_lines
from toy_task import Killed, ToyPool
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.config.parsing import saved_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.folder import own_folder
from vla_trqam.engine.folder.checkpoints import read_position
from vla_trqam.errors import UserError
from vla_trqam.jobs import states
from vla_trqam.jobs.kinds import settings_of_run
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.trqam import TRQAM

FAILURES = [RuntimeError, KeyError, MemoryError, KeyboardInterrupt]
OFFLINE = ("--steps=4", "--online.steps=0")


def attempt(tiny, folder, *flags):
    try:
        return tiny(folder, *flags)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("place", ["fill", "RolloutPool", "phases_of", "update"])
def test_whatever_fails_before_the_first_checkpoint_does_not_block_the_command(
    place, error, tiny, no_conclusion, tmp_path
):
    def fail(*_, **__):
        raise error

    where = {"fill": states, "update": BehaviourCloning}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where.get(place, engine), place, fail)
        outcome = attempt(tiny, tmp_path / "run")
        assert outcome == (130 if error is KeyboardInterrupt else error)
    assert not (tmp_path / "run").exists()
    assert tiny(tmp_path / "run", "--pretrain.steps=1", *OFFLINE) == 0


def test_a_failure_after_the_first_checkpoint_leaves_it_to_go_on_from(
    tiny, resume, no_conclusion, uninterrupted, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 2, RuntimeError)
        assert attempt(tiny, tmp_path / "run") is RuntimeError
    assert resume(tmp_path / "run") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


def test_the_command_of_a_run_that_died_goes_on_with_it(
    tiny, no_conclusion, uninterrupted, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 2, RuntimeError)
        assert attempt(tiny, tmp_path / "run") is RuntimeError
    assert tiny(tmp_path / "run", "--resume=true") == 0
    assert differences(final_state(tmp_path / "run"), uninterrupted[0]) == []


def test_a_second_run_in_the_folder_is_refused(tiny, resume, no_conclusion, tmp_path, capsys):
    said, folder = [], tmp_path / "run"

    def another(_):
        print(file=sys.stderr)
        assert resume(folder) == 2
        assert tiny(folder) == 2
        said.extend(capsys.readouterr().err.splitlines()[-2:])
        ToyPool.before_run = None

    ToyPool.before_run = another
    assert tiny(folder) == 0
    assert said == 2 * [
        f"error: another process is at work in {folder}; wait until it ends, or choose another "
        "--output_dir"
    ]


def test_a_run_without_checkpoint_begins_anew_and_keeps_what_was_there(
    tiny, resume, no_conclusion, uninterrupted, tmp_path, capsys
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, BehaviourCloning, 3)
        with pytest.raises(Killed):
            tiny(folder)
    lines, header = metrics_lines(folder), (folder / "replay" / "replay.json").read_text()
    assert lines
    assert resume(folder) == 0
    kept = folder / "before_restart_1"
    assert f"begins anew; what was there (metrics.jsonl, replay) is kept in {kept}" in (
        capsys.readouterr().out
    )
    assert metrics_lines(kept) == lines
    assert (kept / "replay" / "replay.json").read_text() == header
    assert differences(final_state(folder), uninterrupted[0]) == []


def spoil_last(folder):
    weights = folder / "checkpoints" / "last" / "algorithm" / "networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return weights.resolve()


def test_a_damaged_last_checkpoint_names_the_flag_with_which_the_run_goes_on_to_the_same_bits(
    tiny, resume, no_conclusion, uninterrupted, tmp_path, capsys
):
    folder = tmp_path / "run"
    assert tiny(folder) == 0
    weights = spoil_last(folder)
    replay = (folder / "replay" / "replay.json").read_text()
    capsys.readouterr()
    assert resume(folder) == 2
    said = capsys.readouterr().err
    assert str(weights) in said
    assert said.endswith("--resume=true --checkpoint=000010 goes on from it\n")
    assert said.count("\n") == 1
    assert (folder / "replay" / "replay.json").read_text() == replay
    flags = ["--resume=true", f"--output_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 2)
        with pytest.raises(Killed):
            finetune_robomimic.main([*flags, "--checkpoint=000004"])
    assert (folder / "checkpoints" / "last").resolve().name == "000004"
    aside = sorted(path.name for path in (folder / "before_restart_1" / "checkpoints").iterdir())
    assert aside == ["000006", "000010", "000012"]
    assert go_on(folder, "--checkpoint=000999") == 2
    assert "--checkpoint=000999 is not in " in (said := capsys.readouterr().err)
    assert "checkpoints: there are 000004" in said
    assert resume(folder) == 0
    assert differences(final_state(folder), uninterrupted[0]) == []
    saved = saved_config(FinetuneRobomimicConfig, folder / "config.yaml")
    assert saved.checkpoint is None


def test_a_run_is_gone_on_with_from_another_folder_than_it_was_begun_in(
    tiny, resume, no_conclusion, uninterrupted, toy_file, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.chdir(toy_file.parent)
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 4)
        with pytest.raises(Killed):
            tiny(folder, f"--dataset.path={toy_file.name}")
    monkeypatch.chdir(tmp_path)
    assert settings_of_run(folder).dataset.path == toy_file.resolve()  # what evaluate.py reads
    spent = read_position(folder / "checkpoints/last").wall_clock["pretrain"]
    assert resume(folder) == 0
    assert read_position(folder / "checkpoints/last").wall_clock["pretrain"] == spent > 0.0
    assert differences(final_state(folder), uninterrupted[0]) == []


def test_a_checkpoint_is_for_a_resumed_run(tiny, tmp_path, capsys):
    assert tiny(tmp_path / "run", "--checkpoint=000004") == 2
    assert "--checkpoint=000004 is one to go on from; add --resume=true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def go_on(folder, *flags):
    return finetune_robomimic.main(["--resume=true", f"--output_dir={folder}", *flags])


def without_times(state):
    """Two runs of equal updates may have logged and saved at other moments."""
    return {name: value for name, value in state.items() if name != "metrics"}


@pytest.mark.parametrize("asked_at", ["the end", "a kill"])
def test_more_offline_updates_end_in_the_bits_of_a_run_that_had_them_from_the_start(
    asked_at, tiny, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "whole", "--steps=6", "--online.steps=0") == 0
    folder = tmp_path / "run"
    if asked_at == "the end":
        assert tiny(folder, *OFFLINE) == 0
    else:
        with pytest.MonkeyPatch.context() as patch:
            dies_at_update(patch, TRQAM, 3)
            with pytest.raises(Killed):
                tiny(folder, *OFFLINE)
    assert go_on(folder, "--steps=6") == 0
    assert "more updates: --steps=6 instead of 4" in capsys.readouterr().out
    whole, more = (without_times(final_state(tmp_path / n)) for n in ("whole", "run"))
    assert differences(more, whole) == []
    assert saved_config(FinetuneRobomimicConfig, folder / "config.yaml").steps == 6
    assert go_on(folder) == 0


def test_more_online_updates_find_room_in_the_replay(tiny, no_conclusion, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    assert tiny(folder, "--online.steps=3") == 0
    assert go_on(folder, "--online.steps=6") == 0
    more = without_times(final_state(folder))
    assert differences(more, without_times(uninterrupted[0])) == []


def test_a_run_without_online_updates_can_be_given_some(
    tiny, no_conclusion, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    assert tiny(folder, "--online.steps=0") == 0
    assert go_on(folder, "--online.steps=6") == 0
    more = without_times(final_state(folder))
    assert differences(more, without_times(uninterrupted[0])) == []


def test_what_a_method_learnt_beside_the_policy_is_not_offered_to_be_thrown_away(
    tiny, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "run", "--method.type=fql", "--method.hidden_dims=[8]") == 0
    capsys.readouterr()
    assert go_on(tmp_path / "run", "--steps=9") == 2
    said = capsys.readouterr().err
    assert "comes too late" in said
    assert "no other run can begin with what fql learns beside the policy" in said
    assert "--policy.path" not in said


def test_updates_do_not_shrink_and_do_not_grow_in_a_phase_that_is_over(
    tiny, no_conclusion, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["recipes/finetune_robomimic.py"])
    assert tiny(folder) == 0
    capsys.readouterr()
    assert go_on(folder, "--online.steps=5") == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: --online.steps=5 is fewer than the 6 of the run in {folder}, which can only be "
        "gone on with for more\n"
    )
    assert go_on(folder, "--steps=9") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --steps=9 comes too late: ")
    assert said.count("\n") == 1
    *_, command = said.strip().partition("a new run goes on from its checkpoint: ")
    words = shlex.split(command)
    assert words[:4] == ["accelerate", "launch", "-q", "recipes/finetune_robomimic.py"]
    assert "--steps=3" in words
    monkeypatch.chdir(tmp_path)
    assert finetune_robomimic.main(words[4:]) == 0
    (begun,) = (tmp_path / "outputs" / "finetune_robomimic").iterdir()
    saved = saved_config(FinetuneRobomimicConfig, begun / "config.yaml")
    assert saved.steps == 3
    assert saved.policy.path == folder / "checkpoints" / "last" / "pretrained_model"
    assert saved_config(FinetuneRobomimicConfig, folder / "config.yaml").steps == 6


def test_updates_do_not_grow_where_step_sizes_fall(tiny, no_conclusion, tmp_path, capsys):
    """They would rise again."""
    assert tiny(tmp_path / "run", "--lr_end=0.1") == 0
    capsys.readouterr()
    assert go_on(tmp_path / "run", "--online.steps=9") == 2
    said = capsys.readouterr().err
    assert f"the step sizes of the run in {tmp_path / 'run'} fall to --lr_end=0.1 of them" in said


def test_the_settings_file_names_the_new_number_before_anything_is_trained(
    tiny, no_conclusion, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 1)
        with pytest.raises(Killed):
            go_on(folder, "--steps=6")
    assert saved_config(FinetuneRobomimicConfig, folder / "config.yaml").steps == 6
    assert own_folder.last_checkpoint(folder).name == "000004"


@pytest.mark.parametrize("place", ["_set_up", "prepare_torch"])
def test_a_command_that_is_refused_leaves_the_run_as_it_was(place, tiny, no_conclusion, tmp_path):
    """A number that was mistyped could not be taken back."""
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE, "--save_freq=2") == 0
    (folder / "diverged.txt").write_text("it did")
    before = saved_config(FinetuneRobomimicConfig, folder / "config.yaml")

    def refused(*_, **__):
        raise UserError("there is no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, place, refused)
        assert go_on(folder, "--online.steps=40000") == 2
    assert saved_config(FinetuneRobomimicConfig, folder / "config.yaml") == before
    assert (folder / "diverged.txt").exists()
    assert go_on(folder, "--online.steps=6") == 0
    assert not (folder / "diverged.txt").exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(states.StateJob, "opened"), (own_folder, "check_launched_alike")]
)
def test_a_command_that_is_refused_does_not_go_back(owner, name, tiny, no_conclusion, tmp_path):
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE, "--save_freq=2") == 0
    there = sorted(path.name for path in folder.rglob("*"))

    def refused(*_, **__):
        raise UserError("it has other processes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, refused)
        assert go_on(folder, "--checkpoint=000002") == 2
    assert own_folder.last_checkpoint(folder).name == "000004"
    assert sorted(path.name for path in folder.rglob("*")) == there


def test_the_flags_of_a_resumed_run_are_beside_its_own_settings(tiny, no_conclusion, tmp_path):
    """Not beside those of a preset, which may not go together with them."""
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE) == 0
    presets = tmp_path / "presets.yaml"
    presets.write_text("default: {online: {steps: -1}}")
    flags = ["--resume=true", f"--output_dir={folder}", "--online.steps=6"]
    assert states.read_config(FinetuneRobomimicConfig, presets, flags).online.steps == 6
    with pytest.raises(UserError, match="leave out --batch_size: batch_size is 7 here and"):
        states.read_config(FinetuneRobomimicConfig, presets, [*flags, "--batch_size=7"])


def test_a_new_run_from_the_checkpoint_of_one_with_anothers_base_does_not_ask_for_that_base(
    tmp_path,
):
    config = FinetuneRobomimicConfig(base_run=tmp_path / "base")
    assert "--base_run=null" in states._restart(config, tmp_path)
    assert "--base_run=null" not in states._restart(FinetuneRobomimicConfig(), tmp_path)


def test_a_run_is_not_gone_on_with_on_other_data(tiny, no_conclusion, toy_file, tmp_path, capsys):
    data, folder = tmp_path / "data.hdf5", tmp_path / "run"
    shutil.copyfile(toy_file, data)
    flags = (f"--dataset.path={data}", *OFFLINE)
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 3)
        with pytest.raises(Killed):
            tiny(folder, *flags)
    whole = data.read_bytes()
    with h5py.File(data, "r+") as file:
        file["data/demo_3/rewards"][0] = 0.25
    capsys.readouterr()
    assert go_on(folder) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: {data} (dataset) is not the one that the run in {folder} was begun with; bring "
        f"that one back, or begin a new run with --policy.path={folder}/checkpoints/last/"
        "pretrained_model\n"
    )
    data.unlink()
    assert go_on(folder) == 2
    assert f"{data} (dataset) is missing" in capsys.readouterr().err
    data.write_bytes(whole)  # at another time
    assert go_on(folder) == 0


def test_a_folder_of_an_older_version_is_gone_on_with(tiny, no_conclusion, tmp_path, capsys):
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE) == 0
    before = final_state(folder)
    (folder / "inputs.json").unlink()
    for manifest in folder.rglob("manifest.json"):
        manifest.unlink()
    saved = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(saved.replace("checkpoint: null\n", ""))
    capsys.readouterr()
    assert go_on(folder) == 0
    said = capsys.readouterr().out
    assert f"{folder} has no inputs.json: what it was begun with cannot be compared\n" in said
    assert "has no manifest.json: older versions wrote no checksums\n" in said
    assert differences(final_state(folder), before) == []

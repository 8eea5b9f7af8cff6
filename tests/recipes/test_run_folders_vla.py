"""The recipes for LeRobot's policies on a toy task: failures, other inputs, more updates."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from toy_deaths import dies_at_update
from toy_files import differences
from toy_images import images_state
from vla_runs import (
    files,
    forgetful_pool,
    killed,
    main,
    no_conclusion,
    resume,
    tiny,
    whole,
    without_conclusion,
    without_simulator,
)
from vla_trqam.adapters.loading import load_policy

from vla_trqam.config.parsing import saved_config
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.folder.pins import read_pins
from vla_trqam.errors import UserError
from vla_trqam.jobs import vla
from vla_trqam.jobs.vla_pins import take_pins

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "whole", "without_simulator"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("error", [KeyError, UserError])
@pytest.mark.parametrize("place", ["give_base", "check_data", "make_method", "_start_simulators"])
def test_what_fails_before_the_first_checkpoint_leaves_what_was_read_unless_it_is_refused(
    place, error, tiny, no_conclusion, whole, tmp_path, monkeypatch, capsys
):
    """A refusal after the preflight is none of the settings, and the pass was not for naught."""

    def fail(*_, **__):
        raise error(place)

    where, folder = {"_start_simulators": engine}, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(where.get(place, vla), place, fail)
        if error is UserError:
            assert tiny(folder) == 2
        else:
            with pytest.raises(KeyError):
                tiny(folder)
    refused = error is UserError and place != "_start_simulators"
    assert folder.exists() == (place != "give_base" and not refused)
    if folder.exists():
        assert f"is kept in {folder}: --resume=true goes on" in capsys.readouterr().out
        assert resume(folder) == 0
        assert differences(images_state(folder), without_conclusion(whole.state)) == []


def without_metrics(state):
    """Two runs of equal updates may have logged at other moments."""
    return {k: v for k, v in state.items() if k not in ("metrics", "evaluation")}


def test_more_online_updates_end_in_the_bits_of_a_run_that_had_them_from_the_start(
    tiny, no_conclusion, whole, tmp_path
):
    folder = tmp_path / "run"
    assert tiny(folder, "--online.steps=2") == 0
    assert main("--resume=true", f"--output_dir={folder}", "--online.steps=4") == 0
    assert differences(without_metrics(images_state(folder)), without_metrics(whole.state)) == []
    assert saved_config(FinetuneVLAConfig, folder / "config.yaml").online.steps == 4
    assert resume(folder) == 0


def test_a_phase_that_is_over_names_the_command_that_goes_on_from_the_checkpoint(
    whole, no_conclusion, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["recipes/finetune_pi0.py"])
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder, symlinks=True)
    assert main("--resume=true", f"--output_dir={folder}", "--steps=4") == 2
    said = capsys.readouterr().err
    assert "--steps=4 comes too late" in said
    *_, command = said.strip().partition("goes on from its checkpoint: ")
    words = shlex.split(command)
    assert words[:4] == ["accelerate", "launch", "-q", "recipes/finetune_pi0.py"]
    last = folder / "checkpoints" / "last"
    own = {f"--policy.path={last / 'pretrained_model'}", f"--critic.path={last}", "--steps=1"}
    assert own | {"--policy.adapter=continue"} <= set(words)
    assert main(*words[4:]) == 0
    (begun,) = (tmp_path / "outputs" / "finetune_pi0").iterdir()
    assert (begun / "checkpoints" / "000005").is_dir()
    assert sorted(read_pins(begun)) == ["base", "dataset", "policy"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("policy", "model.safetensors"),
        ("policy", "policy_preprocessor.json"),
        ("dataset", "meta/info.json"),
        ("dataset", "data/chunk-000/file-000.parquet"),
    ],
)
def test_a_run_is_not_gone_on_with_on_another_policy_or_dataset(
    name, file, whole, files, tmp_path, capsys
):
    folder, other = tmp_path / "run", tmp_path / name
    shutil.copytree(whole.folder, folder, symlinks=True)
    given = files.policy if name == "policy" else files.dataset
    shutil.copytree(given, other)
    pins = (folder / "inputs.json").read_text()
    (folder / "inputs.json").write_text(pins.replace(str(given), str(other)))
    with (other / file).open("ab") as changed:
        changed.write(b" ")
    assert resume(folder) == 2
    said = capsys.readouterr().err
    assert f"error: {other / file} ({name}) is not the one that the run in {folder} was" in said


def test_a_resumed_run_takes_the_commits_of_its_beginning(tiny, no_conclusion, tmp_path):
    folder, asked = tmp_path / "run", []
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        tiny(folder)
    path, commit = folder / "inputs.json", "0123456789abcdef0123456789abcdef01234567"
    pins = json.loads(path.read_text())
    pins["policy"]["commit"] = commit
    path.write_text(json.dumps(pins))

    def load(*arguments, revision, **settings):
        asked.append(revision)
        return load_policy(*arguments, revision=revision, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla_trqam.jobs.vla_inputs.load_policy", load)
        assert resume(folder) == 0
    assert asked == [commit]
    saved = saved_config(FinetuneVLAConfig, folder / "config.yaml")
    assert saved.policy.revision is None
    pins["dataset"]["commit"] = commit[::-1]
    pins["base"] = pins["policy"] | {"commit": commit[1:] + "0"}
    path.write_text(json.dumps(pins))
    saved.resume = True
    assert take_pins(saved) == commit[1:] + "0"
    assert (saved.policy.revision, saved.dataset.revision) == (commit, commit[::-1])


def test_a_resumed_run_takes_the_files_of_its_beginning_where_a_link_has_moved(
    tiny, no_conclusion, files, tmp_path
):
    """As `checkpoints/last` of an earlier run does when that one is given more steps."""
    folder, last, asked = tmp_path / "run", tmp_path / "last", []
    first, second = (Path(shutil.copytree(files.policy, tmp_path / n)) for n in ("first", "second"))
    last.symlink_to(first)
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        tiny(folder, f"--policy.path={last}")
    last.unlink()
    last.symlink_to(second)

    def load(path, **settings):
        asked.append(path)
        return load_policy(path, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla_trqam.jobs.vla_inputs.load_policy", load)
        assert resume(folder) == 0
    assert asked == [str(first)]
    pins = json.loads((folder / "inputs.json").read_text())
    data = Path(pins["dataset"]["folder"])
    pins["success labels"] = {"asked": "x", "folder": str(tmp_path), "commit": None, "files": {}}
    (folder / "inputs.json").write_text(json.dumps(pins))
    saved = saved_config(FinetuneVLAConfig, folder / "config.yaml")
    saved.resume, saved.dataset.root = True, Path("elsewhere")
    saved.dataset.success_labels = Path("elsewhere/labels.json")
    take_pins(saved)
    assert saved.dataset.root == data
    assert saved.dataset.success_labels == tmp_path / "labels.json"

"""Several runs that begin with one base: each is to the bit what it would have been alone."""

import json
import shutil

import pytest
from safetensors.numpy import load_file
from toy_deaths import dies_at_update
from toy_files import differences, final_state, metrics_lines
from toy_task import Killed, ToyPool

from vla_trqam.data.replay import Replay
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.trqam import TRQAM

ALONE = ("--steps=0", "--online.steps=0")
FQL = ("--method.type=fql", "--method.hidden_dims=[8]")


@pytest.fixture
def base_run(tiny, tmp_path):
    folder = tmp_path / "base"
    assert tiny(folder, *ALONE) == 0
    return folder


def no_cloning(patch):
    dies_at_update(patch, BehaviourCloning, 1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), FQL, ("--critic.warmup_steps=3",)])
def test_a_run_that_takes_a_base_is_to_the_bit_the_run_that_makes_it(
    flags, tiny, base_run, tmp_path, monkeypatch
):
    videos = "--eval.videos=0"
    assert tiny(tmp_path / "alone", videos, *flags) == 0
    no_cloning(monkeypatch)
    ToyPool.rounds.clear()
    assert tiny(tmp_path / "shared", videos, f"--base_run={base_run}", *flags) == 0
    shared, alone = (final_state(tmp_path / name) for name in ("shared", "alone"))
    assert differences(shared, alone) == []
    assert "evaluation" in alone
    played = [seed for seeds in ToyPool.rounds for seed in seeds]
    assert not {1_000_000, 1_000_001} & set(played), "the base's episodes were not played again"
    assert played.count(10_000) == 1, "of the final states only the tuned policy was asked"
    assert played.count(500_000) == 4, "nor was the base evaluated before the first update"


def test_all_methods_of_a_seed_have_one_base_and_one_replay(tiny, no_conclusion, tmp_path):
    """Also without sharing: what acts at first is the policy as it came, whatever the method."""
    offline = ("--online.steps=0",)
    assert tiny(tmp_path / "trqam", *offline) == 0
    assert tiny(tmp_path / "fql", *offline, *FQL) == 0
    one, other = (final_state(tmp_path / name) for name in ("trqam", "fql"))
    same = {"base", "replay", "observations", "actions", "rewards", "episodes"}
    assert not same & set(differences(one, other))
    rates = [
        next(line for line in metrics_lines(tmp_path / name) if line["phase"] == "eval")
        for name in ("trqam", "fql")
    ]
    assert rates[0] == rates[1]


def test_a_base_alone_has_its_episodes_and_evaluations_in_a_record(base_run):
    record = json.loads((base_run / "base_record/outcomes.json").read_text())
    assert record["rolled_out"] == [1_000_000, 1_000_001]
    assert [row[0] for row in record["evaluated"]["3"]] == [10_000, 10_001, 500_000, 500_001]
    assert Replay.open(base_run / "base_record/episodes").num_episodes == 2
    assert (base_run / "checkpoints/last").resolve().name == "pretrain_000006"
    assert not (base_run / "report.json").exists(), "no method was trained"


def test_a_killed_run_goes_on_without_the_base_run(
    tiny, resume, no_conclusion, base_run, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_cloning(patch)
        dies_at_update(patch, TRQAM, 3)
        with pytest.raises(Killed):
            tiny(folder, f"--base_run={base_run}")
    shutil.rmtree(base_run)
    assert resume(folder) == 0
    assert differences(final_state(folder), uninterrupted[0]) == []


def test_what_is_taken_is_pinned(tiny, no_conclusion, base_run, tmp_path):
    assert tiny(tmp_path / "run", f"--base_run={base_run}") == 0
    pins = json.loads((tmp_path / "run/inputs.json").read_text())
    assert pins["base"]["asked"] == str(base_run)
    weights = base_run / "base_policy/model.safetensors"
    pin = pins["base"]["files"]["base_policy/model.safetensors"]
    assert pin["size"] == weights.stat().st_size
    assert "base_record/outcomes.json" in pins["base"]["files"]
    own = load_file(tmp_path / "run/base_policy/model.safetensors")
    assert all((own[key] == value).all() for key, value in load_file(weights).items())


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seed=1", "made its base with --seed=0, this run has 1; make a base"),
        ("--pretrain.steps=7", "--pretrain.steps=6, this run has 7"),
        ("--policy.hidden_dims=[9]", "--policy.hidden_dims=[8], this run has [9]"),
        ("--eval.episodes=3", "--eval.episodes=2, this run has 3"),
    ],
)
def test_another_base_is_refused_before_there_is_a_folder(
    flag, said, tiny, base_run, tmp_path, capsys
):
    assert tiny(tmp_path / "run", f"--base_run={base_run}", flag) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_data_and_a_run_without_a_record_are_refused(
    tiny, no_conclusion, base_run, toy_file, uninterrupted, tmp_path, capsys
):
    other = tmp_path / toy_file.name
    other.write_bytes(toy_file.read_bytes() + b" ")
    flags = (f"--base_run={base_run}", f"--dataset.path={other}")
    assert tiny(tmp_path / "run", *flags) == 2
    assert f"made its base of other data than {other}" in capsys.readouterr().err
    assert tiny(tmp_path / "run", f"--base_run={uninterrupted[1]}") == 2
    assert "is not the folder of a finished run with --steps=0" in capsys.readouterr().err
    trained = shutil.copytree(base_run, tmp_path / "trained")
    settings = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(settings.replace("\nsteps: 0", "\nsteps: 3"))
    assert (trained / "config.yaml").read_text() != settings
    assert tiny(tmp_path / "run", f"--base_run={trained}") == 2
    assert "is not the folder of a finished run with --steps=0" in capsys.readouterr().err
    assert tiny(tmp_path / "run", f"--base_run={base_run}", *ALONE) == 2
    assert "nothing would be trained" in capsys.readouterr().err

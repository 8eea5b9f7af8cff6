"""evaluate.py on the toy task: what acts, on what, and what does not go together."""

import json
import re
import shutil

import pytest
from toy_settings import TINY
from toy_task import ACTION_DIM, ToyPool, toy_family
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes import evaluate, finetune_robomimic

from vla_trqam.engine import conclude as showcase
from vla_trqam.engine import finetune as engine
from vla_trqam.errors import UserError
from vla_trqam.jobs import evaluation, kinds

pytestmark = pytest.mark.slow

METHODS = {
    "trqam": [],
    "fewer_steps": ["--policy.tuned_flow_steps=2"],
    "fql": ["--method.type=fql", "--method.hidden_dims=[16]", "--method.alpha=3"],
    "ifql": ["--method.type=ifql", "--method.num_samples=4", "--method.train_base=true"],
    "dsrl": ["--method.type=dsrl", "--method.hidden_dims=[16]"],
    "cgql_l": ["--method.type=cgql_l", "--method.inverse_temperature=3"],
    "sac_flow": ["--method.type=sac_flow", "--method.hidden_dims=[16]", "--method.gate_dim=4"],
    "qam_e": ["--method.type=qam_e", "--method.edit_hidden_dims=[16]", "--method.edit_scale=0.9"],
    "residual": ["--method.type=residual", "--method.edit_hidden_dims=[16]"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_file):
    """Folders of finished runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "RolloutPool", ToyPool)
        patch.setattr(showcase, "write_plots", lambda *_, **__: [])
        for name, flags in METHODS.items():
            arguments = [f"--dataset.path={toy_file}", *TINY, *flags, "--eval.episodes=16"]
            assert finetune_robomimic.main([*arguments, f"--output_dir={root / name}"]) == 0
    return {name: root / name for name in METHODS}


def stand_in(env_args, *, max_episode_steps, obs_keys, action_size):
    """Stands in for `robomimic_family`, which knows the size of no chosen observations either."""
    assert action_size == ACTION_DIM
    return toy_family(max_episode_steps, task=env_args["env_name"], state_size=None)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(evaluation, "RolloutPool", ToyPool)
    monkeypatch.setattr(kinds, "robomimic_family", stand_in)
    ToyPool.rounds, ToyPool.before_run = [], None


def compared(folder, *flags):
    assert evaluate.main([*flags, f"--output_dir={folder}", "--videos=0"]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def refusal(capsys, *flags):
    """The sentence, and that nothing was played."""
    capsys.readouterr()
    assert evaluate.main([*flags]) == 2
    assert ToyPool.rounds == []
    return capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_a_runs_last_checkpoint_against_its_base_gives_the_runs_own_evaluation(
    name, runs, tmp_path
):
    expected = json.loads((runs[name] / "evaluation.json").read_text())
    found = compared(tmp_path / "out", f"--a={runs[name]}")
    assert {key: found.get(key) for key in expected} == expected
    came = found.get("base_as_it_came")
    assert (came is not None) == (name == "fewer_steps")
    base = found["base_steps"] if came is None else came["steps"]
    assert base != found["tuned_steps"], "the two must be told apart"


def test_two_runs_of_different_methods_play_the_same_states(runs, tmp_path, capsys):
    found = compared(tmp_path / "out", f"--a={runs['fql']}", f"--b={runs['trqam']}")
    ours, others = (
        json.loads((runs[name] / "evaluation.json").read_text()) for name in ("fql", "trqam")
    )
    assert found["tuned_success"] == ours["tuned_success"]
    assert found["tuned_steps"] == ours["tuned_steps"]
    assert found["base_steps"] == others["tuned_steps"]
    assert found["policies"]["tuned"].startswith("FQL's networks in ")
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[-4:-1]] == ["b", "a", "a - b"]


def test_of_a_policy_folder_the_policy_acts_whatever_the_method_of_its_run(runs, tmp_path):
    """FQL leaves the policy as it came: its folder acts as the base does."""
    policy = runs["fql"] / "checkpoints/last/pretrained_model"
    found = compared(tmp_path / "out", f"--a={policy}", f"--b={runs['fql'] / 'base_policy'}")
    assert found["base_steps"] == found["tuned_steps"]


def test_seeds_and_their_number_are_the_flags(runs, tmp_path):
    checkpoint = runs["trqam"] / "checkpoints/000006"
    found = compared(tmp_path / "out", f"--a={checkpoint}", "--episodes=3", "--first_seed=7")
    assert found["seeds"] == [7, 8, 9]
    assert found["policies"]["tuned"].endswith("checkpoints/000006/pretrained_model")


def test_a_checkpoint_of_the_pretraining_acts_by_its_policy(runs, tmp_path):
    checkpoint = runs["fql"] / "checkpoints/pretrain_000006"
    found = compared(tmp_path / "out", f"--a={checkpoint}")
    assert found["policies"]["tuned"].startswith("the saved policy in ")


def test_the_result_is_not_written_over(runs, tmp_path, capsys):
    compared(tmp_path / "out", f"--a={runs['trqam']}")
    ToyPool.rounds = []
    said = refusal(capsys, f"--a={runs['trqam']}", f"--output_dir={tmp_path / 'out'}")
    assert "is in use; choose another --output_dir" in said


def make_policy(folder, observation_dim):
    MLPFlowPolicy(MLPFlowConfig(observation_dim, 2, 2, hidden_dims=(8,))).save_pretrained(folder)
    return folder


def test_what_does_not_go_together_is_one_sentence_and_leaves_no_folder(runs, tmp_path, capsys):
    out, run = f"--output_dir={tmp_path / 'out'}", f"--a={runs['trqam']}"
    wide = make_policy(tmp_path / "wide", 5)
    for flags, sentence in (
        ([], "--a=FOLDER is missing"),
        ([f"--a={tmp_path / 'no'}"], "must be the folder of a run, of a checkpoint or of a policy"),
        ([f"--a={wide}"], "belongs to no run that has a base: name another by --b"),
        ([f"--a={wide}", f"--b={wide}"], "no simulator is known"),
        ([run, f"--b={wide}"], "they see different observations: a of size 3 and b of size 5"),
        ([run, "--episodes=0"], "--episodes=0 must be at least 1"),
        ([run, "--first_seed=499999"], "must leave its 16 initial states below 500000"),
        (
            [run, "--env.shadows=false"],
            "--env.task and the like are of a simulator: add --env.type",
        ),
    ):
        said = refusal(capsys, *flags, out)
        assert said.startswith("error: ")
        assert sentence in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_by_itself_acts_where_its_saved_policy_is_what_acts(runs, tmp_path, capsys):
    """As it is pulled from the Hub: without the settings of its run."""
    for name in ("trqam", "fql"):
        for part in ("pretrained_model", "algorithm"):
            shutil.copytree(runs[name] / "checkpoints/000012" / part, tmp_path / name / part)
    found = compared(tmp_path / "out", f"--a={tmp_path / 'trqam'}", f"--b={runs['trqam']}")
    assert found["tuned_steps"] == found["base_steps"]
    ToyPool.rounds = []
    said = refusal(capsys, f"--a={tmp_path / 'fql'}", f"--b={runs['trqam']}")
    assert "acts by networks of its method (one_step), which only the settings of its run" in said


def test_a_damaged_checkpoint_is_refused_with_its_file(runs, tmp_path, capsys):
    shutil.copytree(runs["dsrl"], tmp_path / "run", symlinks=True)
    networks = tmp_path / "run/checkpoints/000012/algorithm/networks.safetensors"
    networks.write_bytes(networks.read_bytes()[:-1])
    assert str(networks) in refusal(capsys, f"--a={tmp_path / 'run'}")


def test_networks_of_other_settings_are_refused(runs, tmp_path, capsys):
    shutil.copytree(runs["fql"], tmp_path / "run", symlinks=True)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("  - 16\n", "  - 12\n"))
    said = refusal(capsys, f"--a={tmp_path / 'run'}", f"--output_dir={tmp_path / 'out'}")
    assert "networks.safetensors does not fit the settings of its run: " in said
    assert not (tmp_path / "out").exists()


def test_runs_of_other_tasks_or_observations_are_refused(runs, tmp_path, capsys, monkeypatch):
    shutil.copytree(runs["trqam"], tmp_path / "run", symlinks=True)
    both = [f"--a={runs['trqam']}", f"--b={tmp_path / 'run'}", f"--output_dir={tmp_path / 'out'}"]
    config = tmp_path / "run/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("- object", "- robot0_eef_pos"))
    assert "different observations, [object] and [robot0_eef_pos]" in refusal(capsys, *both)
    config.write_text(re.sub(r"max_episode_steps: \d+", "max_episode_steps: 3", text))
    said = refusal(capsys, *both)
    assert "different --eval.max_episode_steps, " in said
    assert " by the run of --a and 3 by the run of --b: say by --max_episode_steps which" in said
    config.write_text(text)
    meta = iter(["Lift", "Can"])
    monkeypatch.setattr(kinds, "read_env_args", lambda path: {"env_name": next(meta)})
    said = refusal(capsys, *both)
    assert "different tasks, --a in Lift of robomimic and --b in Can of robomimic" in said
    assert not (tmp_path / "out").exists()


def test_videos_that_cannot_be_had_are_said_and_the_result_stays(
    runs, tmp_path, capsys, monkeypatch
):
    def record(self, policy, seeds, *, every):
        raise UserError("no EGL here")

    monkeypatch.setattr(ToyPool, "record", record, raising=False)
    flags = [f"--a={runs['trqam']}", "--episodes=2"]
    assert evaluate.main([*flags, f"--output_dir={tmp_path / 'any'}"]) == 0
    assert "no videos: no EGL here" in capsys.readouterr().out
    assert evaluate.main([*flags, f"--output_dir={tmp_path / 'asked'}", "--videos=1"]) == 2
    assert "error: no EGL here" in capsys.readouterr().err
    for name in ("any", "asked"):
        assert (tmp_path / name / "evaluation.json").is_file()

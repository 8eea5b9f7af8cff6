"""The recipe on the toy task with another number of flow steps than the pretrained policy's."""

import json

import pytest
import yaml
from toy_deaths import dies_at_update, diverges_at_update
from toy_files import differences, final_state
from toy_settings import TINY
from toy_task import Killed, ToyPool, toy_family
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.engine import conclude as showcase
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.methods.base import FlowActor
from vla_trqam.methods.bc import BehaviourCloning
from vla_trqam.methods.trqam import TRQAM

OWN, TUNED = 3, 2
FEWER = f"--policy.tuned_flow_steps={TUNED}"
STATES = "--eval.episodes=8"


def no_plots(*_, **__):
    """They cost most of a tiny run."""
    return []


@pytest.fixture(scope="module")
def fewer(tmp_path_factory, toy_file):
    """A whole run with its conclusion: its folder and what it printed of the evaluation."""
    folder = tmp_path_factory.mktemp("fewer") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "RolloutPool", ToyPool)
        patch.setattr(showcase, "write_plots", no_plots)
        ToyPool.rounds, ToyPool.before_run = [], None
        arguments = [f"--dataset.path={toy_file}", *TINY, FEWER, STATES]
        assert finetune_robomimic.main([*arguments, f"--output_dir={folder}"]) == 0
    return folder, list(ToyPool.rounds)


def steps_in(folder):
    return json.loads((folder / "config.json").read_text())["num_flow_steps"]


def successes(folder, seeds, num_flow_steps):
    policy = MLPFlowPolicy.from_pretrained(folder)
    actor = chunk_policy(policy, FlowActor(policy, num_flow_steps=num_flow_steps), EVALUATION_NOISE)
    return [e.success for e in ToyPool(toy_family()).run(actor, seeds)]


def test_the_tuned_policy_is_saved_with_its_steps_and_the_base_with_its_own(fewer):
    folder, _ = fewer
    assert steps_in(folder / "base_policy") == OWN
    for name in ("000004", "000006", "last"):
        assert steps_in(folder / "checkpoints" / name / "pretrained_model") == TUNED
    pretrained = folder / "checkpoints/pretrain_000006/pretrained_model"
    assert steps_in(pretrained) == OWN


def test_the_evaluation_has_the_base_with_both_numbers_of_steps(fewer):
    folder, rounds = fewer
    assert rounds[-3] == rounds[-2] == rounds[-1], "the same initial states"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    came, seeds = evaluation["base_as_it_came"], evaluation["seeds"]
    base, tuned = folder / "base_policy", folder / "checkpoints/last/pretrained_model"
    assert came["success"] == successes(base, seeds, OWN)
    assert evaluation["base_success"] == successes(base, seeds, TUNED)
    assert evaluation["tuned_success"] == successes(tuned, seeds, None)
    assert (came["num_flow_steps"], came["num_flow_steps_of_base_and_tuned"]) == (OWN, TUNED)


def test_the_report_names_three_policies_and_both_effects(fewer):
    folder, _ = fewer
    text = (folder / "report.md").read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    for label in (
        f"base as it came, {OWN} flow steps",
        f"base, {TUNED} flow steps",
        f"tuned, {TUNED} flow steps",
        "gain of tuning",
        "fewer steps alone",
        "in total",
    ):
        assert rows.count(f"| {label}") == 1, label
    assert f"The base came with {OWN} flow steps: fewer steps alone make " in text
    assert f"- flow steps: {TUNED}; the base came with {OWN}" in text
    report = json.loads((folder / "report.json").read_text())
    assert report["flow_steps"] == {"own": OWN, "tuned": TUNED}


def test_the_base_is_not_evaluated_twice_where_it_acts_as_it_came(
    tiny, tmp_path, toy_pool, capsys, monkeypatch
):
    monkeypatch.setattr(showcase, "write_plots", no_plots)
    folder = tmp_path / "run"
    assert tiny(folder, f"--policy.tuned_flow_steps={OWN}", STATES) == 0
    assert len(toy_pool.rounds[-1]) == 8
    assert [len(seeds) for seeds in toy_pool.rounds].count(8) == 2
    assert "base_as_it_came" not in json.loads((folder / "evaluation.json").read_text())
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == [
        *("base", "tuned", "gain", "report")
    ]


@pytest.mark.parametrize(
    ("learner", "number"), [(BehaviourCloning, 4), (TRQAM, 1), (TRQAM, 5), (TRQAM, 11)]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    learner, number, tiny, resume, no_conclusion, fewer, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, learner, number)
        with pytest.raises(Killed):
            tiny(tmp_path / "run", FEWER)
    assert resume(tmp_path / "run") == 0
    found = differences(final_state(tmp_path / "run"), final_state(fewer[0]))
    assert found == ["evaluation"]
    assert steps_in(tmp_path / "run/base_policy") == OWN


def test_a_rollback_to_the_pretraining_leaves_the_bases_steps(
    tiny, no_conclusion, tmp_path, monkeypatch
):
    diverges_at_update(monkeypatch, TRQAM, 0)
    assert tiny(tmp_path / "run", FEWER, "--on_divergence=rollback") == 0
    assert steps_in(tmp_path / "run/base_policy") == OWN
    assert steps_in(tmp_path / "run/checkpoints/last/pretrained_model") == TUNED


def test_a_given_policy_is_tuned_with_other_steps(tiny, resume, no_conclusion, fewer, tmp_path):
    given = fewer[0] / "base_policy"
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "run", f"--policy.path={given}", FEWER)
    assert resume(tmp_path / "run") == 0
    assert steps_in(tmp_path / "run/base_policy") == OWN
    assert steps_in(tmp_path / "run/checkpoints/last/pretrained_model") == TUNED
    conclusion = no_conclusion[0]
    assert conclusion["base"].own_flow_steps == OWN
    assert conclusion["run"].policy.num_flow_steps == TUNED


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--policy.tuned_flow_steps=0"], "--policy.tuned_flow_steps=0 must be at least 1"),
        (
            ["--method.scheme=posterior", "--policy.tuned_flow_steps=1"],
            "--policy.tuned_flow_steps=1 is too few for the post",
        ),
        (
            ["--method.scheme=posterior", "--policy.num_flow_steps=1"],
            "--policy.num_flow_steps=1 is too few for the posterior",
        ),
        (
            ["--method.type=sqam", "--method.scheme=shifted_euler", "--policy.tuned_flow_steps=1"],
            "--policy.tuned_flow_steps=1 is too few for the scalar adjoint of the shifted_euler",
        ),
        (
            ["--method.type=cgql", "--policy.tuned_flow_steps=1"],
            "--policy.tuned_flow_steps=1 is too few for cgql, whose guidance begins with the secon",
        ),
    ],
)
def test_too_few_steps_are_refused(flags, sentence, tiny, tmp_path, capsys):
    assert tiny(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_chunks_of_a_given_policy_are_its_own(tiny, no_conclusion, tmp_path, capsys):
    """Longer ones than the settings' default, which is for a policy of the run's own."""
    long = MLPFlowPolicy(MLPFlowConfig(3, 2, 12, hidden_dims=(8,), num_flow_steps=2))
    long.save_pretrained(tmp_path / "long")
    flags = [f"--policy.path={tmp_path / 'long'}", "--steps=1", "--online.steps=0"]
    assert tiny(tmp_path / "run", *flags, "--policy.n_action_steps=13") == 2
    said = capsys.readouterr().err
    assert f"--policy.n_action_steps=13 is more than the 12 actions of {tmp_path / 'long'}" in said
    assert tiny(tmp_path / "run", *flags, "--eval.max_episode_steps=11") == 2
    assert "ends every episode within its first chunk of 12 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert tiny(tmp_path / "run", *flags, "--policy.n_action_steps=6") == 0


def test_a_given_policy_of_one_step_needs_the_flag(tiny, no_conclusion, tmp_path, capsys):
    one = MLPFlowPolicy(MLPFlowConfig(3, 2, 2, hidden_dims=(8,), num_flow_steps=1))
    one.save_pretrained(tmp_path / "one")
    flags = [f"--policy.path={tmp_path / 'one'}", "--steps=1", "--online.steps=0"]
    assert tiny(tmp_path / "run", *flags, "--method.scheme=posterior") == 2
    assert "the policy's own number of flow steps, 1, is too few" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for number, more in enumerate((FEWER, "--method.scheme=shifted_euler")):
        assert tiny(tmp_path / f"run_{number}", *flags, more) == 0


# Runs of before there was a scheme.


def make_old(folder):
    """The run's folder as the version before the schemes left it."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    knobs = config["method"]
    config["method"] = {"name": knobs.pop("type"), "inverse_temperature": 1.0}
    for new in ("scheme", "adjoint", "last_step_weight", "keep_activations", "average_rate"):
        del knobs[new]
    del config["policy"]["tuned_flow_steps"]
    config["trqam"] = knobs
    path.write_text(yaml.safe_dump(config))
    for scalars in folder.glob("checkpoints/0*/algorithm/scalars.json"):
        values = json.loads(scalars.read_text())
        assert values.pop("scheme") == "shifted_euler"
        scalars.write_text(json.dumps(values))
        (scalars.parents[1] / "manifest.json").unlink()


def test_an_old_run_goes_on_with_the_scheme_that_it_began_with(
    tiny, resume, no_conclusion, tmp_path, capsys
):
    flags = ("--method.scheme=shifted_euler",)
    assert tiny(tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 8)
        with pytest.raises(Killed):
            tiny(tmp_path / "old", *flags)
    make_old(tmp_path / "old")
    capsys.readouterr()
    assert resume(tmp_path / "old") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "method.scheme" in line]
    config = tmp_path / "old/config.yaml"
    assert said == [
        f"{config} is from before there was a method.scheme: shifted_euler, as it was then"
    ]
    assert no_conclusion[-1]["config"]["method"]["scheme"] == "shifted_euler"
    assert differences(final_state(tmp_path / "old"), final_state(tmp_path / "whole")) == []


def test_old_settings_begin_a_run_of_the_old_scheme_unless_a_flag_says_otherwise(
    tiny, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "old", "--method.scheme=shifted_euler") == 0
    make_old(tmp_path / "old")
    presets, old = finetune_robomimic.PRESETS, f"--config_path={tmp_path / 'old/config.yaml'}"
    capsys.readouterr()
    config = parse_config(FinetuneRobomimicConfig, presets, [old])
    assert config.method.scheme == "shifted_euler"
    assert "from before there was a method.scheme" in capsys.readouterr().out
    config = parse_config(FinetuneRobomimicConfig, presets, [old, "--method.scheme=posterior"])
    assert config.method.scheme == "posterior"
    (tmp_path / "mine.yaml").write_text("trqam: {kl_budget: 0.7}\n")
    mine = f"--config_path={tmp_path / 'mine.yaml'}"
    assert parse_config(FinetuneRobomimicConfig, presets, [mine]).method.scheme == "posterior"
    assert capsys.readouterr().out == ""


def test_the_papers_preset_has_the_authors_chain():
    config = parse_config(FinetuneRobomimicConfig, finetune_robomimic.PRESETS, ["--preset=paper"])
    knobs = config.method
    authors = ("shifted_euler", 1.0, "next", "noiseless_base")
    assert (knobs.scheme, knobs.time_shift, knobs.adjoint_time, knobs.final_step) == authors
    assert config.policy.num_flow_steps == 10

"""A study's steps: what all methods share, what is refused before anything is begun."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from vla_trqam.recipes import compare, finetune_robomimic, study_runs, sweep_kl
from vla_trqam.recipes.study_runs import read_run

from vla_trqam.config.parsing import dump_config, parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.errors import UserError
from vla_trqam.methods.registry import METHODS
from vla_trqam.study.plan import (
    Variant,
    as_flags,
    check_commands,
    make_plan,
    shared_settings,
)
from vla_trqam.study.settings import CompareConfig, SweepConfig

LIFT = {
    "recipe": "finetune_robomimic",
    "flags": {"steps": 100, "online.steps": 50, "evaluate_every": 50},
    "knobs": {"fql": {"alpha": 7}},
}
MAZE = {
    "recipe": "finetune_ogbench",
    "data": {"recipe": "make_ogbench_data", "flags": {"dataset": "d"}, "file": "m.npz"},
    "flags": {"steps": 100, "online.steps": 50, "evaluate_every": 50},
}


def config(folder, **changes):
    settings = {"methods": ("trqam", "fql"), "tasks": ("lift", "maze"), "seeds": (0, 1)}
    settings["table"] = copy.deepcopy({"lift": LIFT, "maze": MAZE})
    return CompareConfig(output_dir=folder, **settings | changes)


def plan_of(settings):
    return make_plan(settings, lambda _: [Variant(n, n, {}) for n in settings.methods], read_run)


def flags_of(step):
    return set(step.command[3:])


def test_methods_of_a_task_and_seed_differ_in_nothing_but_their_knobs(tmp_path):
    plan = plan_of(config(tmp_path))
    by_name = {step.name: step for step in plan.steps}
    one, other = flags_of(by_name["lift/trqam_s1"]), flags_of(by_name["lift/fql_s1"])
    differing = {flag.partition("=")[0] for flag in one ^ other}
    assert differing == {"--method.type", "--method.alpha", "--output_dir"}
    shared = f"--base_run={tmp_path}/runs/lift/base_s1"
    assert shared in one & other
    base = flags_of(by_name["lift/base_s1"])
    assert base - one == {
        "--steps=0",
        "--online.steps=0",
        f"--output_dir={tmp_path}/runs/lift/base_s1",
    }


def test_each_step_comes_after_what_it_needs(tmp_path):
    plan = plan_of(config(tmp_path))
    names = [step.name for step in plan.steps]
    assert names[:4] == ["lift/base_s0", "lift/trqam_s0", "lift/fql_s0", "lift/base_s1"]
    by_name = {step.name: step for step in plan.steps}
    assert by_name["lift/base_s0"].needs == ()
    assert by_name["maze/base_s0"].needs == ("maze/data",)
    assert by_name["maze/fql_s1"].needs == ("maze/base_s1",)
    for step in plan.steps:
        assert all(names.index(need) < names.index(step.name) for need in step.needs)
    assert len(plan.runs) == 8
    assert by_name["maze/data"].done == tmp_path / "data/maze/m.npz"
    assert f"--dataset.path={tmp_path}/data/maze/m.npz" in flags_of(by_name["maze/fql_s1"])


def test_a_begun_run_is_gone_on_with_by_the_flags_that_a_resumed_run_takes(tmp_path):
    run = plan_of(config(tmp_path)).runs[0]
    assert set(run.step.resume[3:]) == {
        "--resume=true",
        f"--output_dir={run.folder}",
        "--num_threads=1",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ("trqam", "magic")}, "--methods: magic is no method; there are trqam"),
        ({"tasks": ("lift", "walk")}, "walk is not in the study's table, which has lift, maze"),
        ({"seeds": ()}, "--seeds=[] is empty"),
        ({"seeds": (1, 1)}, "--seeds=[1, 1] has one twice"),
        ({"workers": 0}, "--workers=0 must be at least 1"),
        ({"flags": {"seed": 3}}, "set seed, which the study sets by itself"),
        (
            {"flags": {"preset": "paper"}},
            "set preset, which the study sets by itself: it stands in",
        ),
        ({"flags": {"num_threads": 4}}, "it is the study's own --num_threads"),
        ({"flags": {"method.kl_budget": 1}}, "their knobs stand in the table's knobs"),
        ({"flags": {"dataset.path": "own.npz"}}, "the flags of the task maze set dataset.path"),
        ({"flags": {"policy.path": "own"}}, "begin with a base that the study makes"),
        ({"flags": {"base_run": "own"}}, "begin with a base that the study makes"),
        ({"flags": {"evaluate_every": 60}}, "does not meet the end of its 100 offline updates"),
        ({"flags": {"stepz": 3}}, "--stepz is not a setting; did you mean --steps?"),
        ({"output_dir": None}, "--output_dir is missing"),
    ],
)
def test_settings_that_do_not_work_are_refused(changes, said, tmp_path):
    folder = changes.pop("output_dir", tmp_path)
    with pytest.raises(UserError) as error:
        plan_of(config(folder, **changes))
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"recipe": "finetune_moon"}, "finetune_moon is no recipe of a study's runs"),
        ({"flags": {}}, "the task lift of the study's table has no recipe"),
        ({**LIFT, "flag": {}}, "has 'flag'; what it can have is recipe, preset"),
        ({**LIFT, "knobs": {"fql": {"kl_budget": 1}}}, "--method.kl_budget is no knob of fql"),
        ({**LIFT, "knobs": {"magic": {}}}, "magic is no method"),
        ({**LIFT, "data": {"recipe": "make"}}, "has no file"),
        (3, "is 3; it must be a mapping of recipe"),
    ],
)
def test_a_table_that_does_not_work_is_refused(entry, said, tmp_path):
    with pytest.raises(UserError) as error:
        plan_of(config(tmp_path, table={"lift": entry}, tasks=("lift",)))
    assert said in str(error.value)


def test_a_study_may_get_more_methods_and_seeds_but_no_other_settings(tmp_path):
    check_commands(plan_of(config(tmp_path, methods=("trqam",), seeds=(0,))), tmp_path)
    check_commands(plan_of(config(tmp_path, workers=1, num_threads=2)), tmp_path)
    kept = json.loads((tmp_path / "commands.json").read_text())
    assert len(kept) == 1 + 4 + 8
    other = plan_of(config(tmp_path, flags={"batch_size": 7}))
    check_commands(other, tmp_path)  # nothing was begun
    kept = json.loads((tmp_path / "commands.json").read_text())
    begun = next(step for step in other.steps if "base" in step.name)
    begun.folder.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        check_commands(plan_of(config(tmp_path, flags={"batch_size": 8})), tmp_path)
    assert "begun with other flags (--batch_size=7, --batch_size=8)" in str(error.value)
    assert json.loads((tmp_path / "commands.json").read_text()) == kept


def test_a_run_that_was_begun_with_another_preset_is_none_of_the_study(tmp_path, monkeypatch):
    """Its command is the same; its success would stand beside knobs that it had not."""
    settings = config(tmp_path, tasks=("lift",), seeds=(0,))
    plan = plan_of(settings)
    for step in plan.steps:
        step.folder.mkdir(parents=True)
        dump_config(step.config, step.folder / "config.yaml")
    check_commands(plan, tmp_path)
    presets = tmp_path / "presets.yaml"
    presets.write_text(
        finetune_robomimic.PRESETS.read_text().replace("base_episodes: ", "base_episodes: 1")
    )
    changed = {**study_runs.RECIPES, "finetune_robomimic": (FinetuneRobomimicConfig, presets)}
    monkeypatch.setattr(study_runs, "RECIPES", changed)
    with pytest.raises(UserError) as error:
        check_commands(plan_of(settings), tmp_path)
    assert "lift/base_s0/config.yaml has other settings: base_episodes is 1" in str(error.value)
    assert "a preset has changed since" in str(error.value)


def test_what_a_methods_runs_share_is_what_is_not_by_itself_so(tmp_path):
    settings = config(tmp_path)
    shared = shared_settings(settings, settings.task("maze"), "fql", read_run)
    assert shared["steps"] == 100
    assert shared["method.type"] == "fql"
    assert not {"seed", "output_dir", "dataset.path", "discount"} & shared.keys()
    lift = settings.task("lift")
    assert shared_settings(settings, lift, "fql", read_run)["method.alpha"] == 7


def test_flags_are_read_back_as_they_were():
    settings = {"a": 1e-5, "b": [1, 2], "c": None, "d": True, "e": 0.5, "f": "x-v0", "g": 1e20}
    read = {
        f[2:].partition("=")[0]: yaml.safe_load(f.partition("=")[2]) for f in as_flags(settings)
    }
    assert read == settings


@pytest.mark.parametrize("preset", list(yaml.safe_load(compare.PRESETS.read_text())))
def test_every_run_of_a_presets_comparison_has_settings_that_work(preset, tmp_path):
    flags = [f"--preset={preset}", f"--output_dir={tmp_path}"]
    methods = yaml.safe_load(compare.PRESETS.read_text())[preset]["methods"]
    known = [name for name in methods if name in METHODS]
    settings = parse_config(CompareConfig, compare.PRESETS, [*flags, f"--methods={known}"])
    plan = plan_of(settings)
    assert len(plan.runs) == len(known) * len(settings.tasks) * len(settings.seeds)


@pytest.mark.parametrize("preset", list(yaml.safe_load(sweep_kl.PRESETS.read_text())))
def test_every_run_of_a_presets_sweep_has_the_budget_of_its_name(preset, tmp_path):
    flags = [f"--preset={preset}", f"--output_dir={tmp_path}"]
    settings = parse_config(SweepConfig, sweep_kl.PRESETS, flags)
    plan = make_plan(settings, lambda _: sweep_kl.variants_of(settings), read_run)
    assert {run.config.method.kl_budget for run in plan.runs} == set(settings.budgets)
    assert all(f"kl{run.config.method.kl_budget:g}" == run.label for run in plan.runs)


def test_a_budget_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="-1 must be positive and finite"):
        SweepConfig(output_dir=tmp_path, tasks=("a",), table={"a": LIFT}, budgets=(0.1, -1))


def test_a_mistake_is_one_sentence_and_status_2(tmp_path, capsys):
    assert compare.main([f"--output_dir={tmp_path / 'study'}", "--methods=[magic]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --methods: magic is no method")
    assert said.count("\n") == 1
    assert not Path(tmp_path / "study").exists()

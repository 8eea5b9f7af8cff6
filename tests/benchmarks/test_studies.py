"""The runs that the claims want are runs that the recipes accept."""

import shlex
from pathlib import Path

import pytest
import studies
import yaml
from vla_trqam.recipes import finetune_ogbench, finetune_robomimic

from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig, StateRunConfig
from vla_trqam.methods.base import MethodConfig
from vla_trqam.methods.registry import METHODS

RECIPES: dict[str, tuple[type[StateRunConfig], Path]] = {
    "finetune_robomimic": (FinetuneRobomimicConfig, finetune_robomimic.PRESETS),
    "finetune_ogbench": (FinetuneOGBenchConfig, finetune_ogbench.PRESETS),
}


def config_of(run: studies.Run) -> StateRunConfig:
    config, presets = RECIPES[run.recipe]
    return parse_config(config, presets, run.flags)


@pytest.mark.parametrize(("study", "count"), [("c1", 138), ("c2", 21), ("c6", 144)])
def test_a_study_has_so_many_runs_each_with_a_name_of_its_own(study: str, count: int) -> None:
    runs = list(studies.STUDIES[study]())
    assert len({run.name for run in runs}) == len(runs) == count
    for run in runs:
        names = [flag.partition("=")[0] for flag in run.flags]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_recipes_accept_a_studys_flags(study: str) -> None:
    first_seed = [run for run in studies.STUDIES[study]() if "--seed=0" in run.flags]
    for run in first_seed:
        chosen = [f.partition("=")[2] for f in run.flags if f.startswith("--method.type=")]
        if set(chosen) <= set(METHODS):
            config = config_of(run)
            assert config.online.steps == 0
            assert isinstance(config.method, MethodConfig)


def made_by(flag: str) -> str:
    """The run of the study that a flag names a folder of."""
    return flag.partition("=RUNS/")[2].removesuffix("/base_policy")


@pytest.mark.parametrize("study", ["c1", "c2", "c6"])
def test_runs_begin_with_the_base_of_their_task_seed_and_steps_which_is_made_before(
    study: str,
) -> None:
    runs = list(studies.STUDIES[study]())
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        if studies.BASE_ALONE in run.flags:
            continue
        (base,) = [made_by(flag) for flag in run.flags if "=RUNS/" in flag]
        maker = runs[names.index(base)]
        assert names.index(base) < number
        assert studies.BASE_ALONE in maker.flags
        ours, theirs = config_of(run), config_of(maker)
        assert (ours.seed, ours.policy.num_flow_steps) == (
            theirs.seed,
            theirs.policy.num_flow_steps,
        )
        if "_tenth_" not in run.name:
            assert (ours.dataset, ours.pretrain) == (theirs.dataset, theirs.pretrain)
            assert (ours.base_episodes, ours.eval) == (theirs.base_episodes, theirs.eval)


@pytest.mark.parametrize("task", studies.TASKS)
def test_a_tasks_budget_and_steps_are_its_presets(task: str) -> None:
    run = studies.run_of(task, "any", 0, ())
    config, place = config_of(run), studies.TASKS[task]
    assert (config.method.kl_budget, config.policy.num_flow_steps) == (
        place.budget,
        place.num_flow_steps,
    )


def test_budgets_of_c6_are_worth_the_presets() -> None:
    """By the squares of what a field that is off by one costs, step by step."""
    found = {run.name: config_of(run).method for run in studies.c6() if "--seed=0" in run.flags}
    # Of the posterior chain at 2 and 10 steps, and of shifted Euler at 3.
    assert found["lift_posterior10_lean_s0"].kl_budget == pytest.approx(0.5 * 2.416 / 0.5, rel=5e-3)
    shifted = found["lift_shifted_euler3_scalar_s0"]
    assert shifted.kl_budget == pytest.approx(0.5 * 0.806 / 0.5, rel=5e-3)


def test_a_base_is_finished_when_what_it_did_is_written() -> None:
    base = next(run for run in studies.c1() if studies.BASE_ALONE in run.flags)
    line = studies.command(base, Path("outputs/c1"))
    assert line.startswith(f"test -f outputs/c1/{base.name}/base_record/outcomes.json || ")


def test_a_command_makes_a_run_goes_on_with_it_or_leaves_it(tmp_path: Path) -> None:
    run = next(run for run in studies.c1() if "_tenth_" in run.name)
    line = studies.command(run, Path("outputs/c1"))
    new = line.rpartition("else ")[2].removesuffix("; fi")
    words = shlex.split(new)
    assert words[:3] == ["python", "-m", "vla_trqam.recipes.finetune_robomimic"]
    assert f"--output_dir=outputs/c1/{run.name}" in words
    assert "--policy.path=outputs/c1/lift_base_s0/base_policy" in words
    assert line.startswith(f"test -f outputs/c1/{run.name}/report.json || test -f outputs/")
    assert f"--resume=true --output_dir=outputs/c1/{run.name}; else" in line


def test_the_list_is_yaml_of_name_recipe_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    studies.main(["c2"])
    listed = yaml.safe_load(capsys.readouterr().out)
    assert [set(run) for run in listed] == [{"name", "recipe", "flags"}] * 21
    assert listed[0]["name"] == "lift_base_s0"
